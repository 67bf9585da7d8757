"""Exact and cheap example weights of "Learning to Reweight Examples" for PyTorch models."""

from l2rw_ext import _loader as _loader
from l2rw_ext import ops as ops
