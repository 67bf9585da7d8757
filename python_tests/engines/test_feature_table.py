"""Every cell of the feature table is true, and the page of the documentation shows the table."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.data.batch import forward
from support.feature_table import COMMAND, ENGINES, FEATURES, Batch, Feature, filled
from support.oracle import assert_exact_steps, assert_same_state, unchanged
from support.paths import ROOT

PAGE = ROOT / "docs" / "coverage.md"
ROWS = {f.name: f for f in FEATURES}


def test_rows_have_names_of_their_own() -> None:
    assert len(ROWS) == len(FEATURES)


def _check_exact(feature: Feature, engine: str, made: tuple[nn.Module, Batch, Batch]) -> None:
    """The oracle's numbers, and the state of one plain training forward, by two steps."""
    model, batch, clean = made
    loss = copy.deepcopy(feature.loss)
    reweighter = Reweighter(model, loss, engine=engine)
    plain = copy.deepcopy((model, loss)) if feature.copied else None

    def check_state() -> None:
        if plain is not None:
            plain[1](forward(plain[0], batch[0]), batch[1])
            assert_same_state(model, plain[0])
            if isinstance(loss, nn.Module):
                assert_same_state(loss, plain[1])

    assert_exact_steps(
        *(model, loss, batch, clean, reweighter),
        count=2 if feature.copied_again else 1,
        copied=feature.copied,
        after=check_state,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ROWS)
def test_cell(name: str, engine: str) -> None:
    feature = ROWS[name]
    made = feature.make()
    refusal = feature.verdict(engine)
    if refusal is None:
        _check_exact(feature, engine, made)
        return
    model, batch, clean = made
    error = refusal.error or NotExactError
    loss = copy.deepcopy(feature.loss)
    reweighter = Reweighter(model, loss, engine=engine)
    with pytest.raises(error, match=refusal.match), unchanged(model), unchanged(loss):
        reweighter.backward(batch, clean)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("name", [f.name for f in FEATURES if f.layerwise is None])
def test_layerwise_with_frozen_parameters(name: str, frozen: int) -> None:
    """Every second parameter is frozen, so that weights are trained without biases and so on."""
    feature = ROWS[name]
    model, batch, clean = feature.make()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters[frozen::2]:
        p.requires_grad_(False)
    if any(p.requires_grad for p in parameters):
        loss = copy.deepcopy(feature.loss)
        reweighter = Reweighter(model, loss, engine="layerwise")
        assert_exact_steps(*(model, loss, batch, clean, reweighter), count=1, copied=feature.copied)


@pytest.mark.parametrize("name", ROWS)
def test_auto_takes_the_first_engine_that_is_exact(name: str) -> None:
    feature = ROWS[name]
    model, batch, clean = feature.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        step = Reweighter(model, copy.deepcopy(feature.loss)).backward(batch, clean)
    assert step.engine == feature.auto
    assert bool(torch.isfinite(step.scores).all())


def test_page_shows_the_table() -> None:
    text = PAGE.read_text()
    assert text == filled(text), f"run: {COMMAND}"
