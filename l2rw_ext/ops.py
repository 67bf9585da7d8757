"""Typed access to the operators ``torch.ops.l2rw_ext``."""

from l2rw_ext import _loader as _loader
