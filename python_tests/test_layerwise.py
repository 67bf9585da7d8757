"""The layer-wise engine against the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from l2rw_ext import Reweighter, reference
from oracle import assert_exact, assert_matches, flat, gradients_of, relative_error, truth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from models import (
    CLASSES,
    Drawn,
    Tokens,
    cross_entropy,
    mlp,
    model_of,
    networks_on_images,
    networks_on_tokens,
    networks_on_vectors,
    token_loss,
    vectors,
)


def _check_drawn(drawn: Drawn) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        assert_exact(drawn.model, drawn.loss_fn, drawn.batch, drawn.clean, engine="layerwise")


@settings(max_examples=100)
@given(networks_on_vectors())
def test_drawn_networks_on_vectors(drawn: Drawn) -> None:
    _check_drawn(drawn)


@settings(max_examples=60)
@given(networks_on_images())
def test_drawn_networks_on_images(drawn: Drawn) -> None:
    _check_drawn(drawn)


@settings(max_examples=30)
@given(networks_on_tokens())
def test_drawn_networks_on_tokens(drawn: Drawn) -> None:
    _check_drawn(drawn)
