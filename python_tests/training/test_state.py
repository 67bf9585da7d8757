"""A model and a Reweighter can be saved, copied and pickled after use, and keep their buffers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.models import CLASSES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_exact, truth

ENGINES = ["auto", "double_backward"]


def _used(engine: Any = "auto", model: nn.Module | None = None) -> Reweighter:
    reweighter = Reweighter(model or mlp(), cross_entropy, engine=engine)
    for _ in range(2):
        reweighter.backward(vectors(6), vectors(4))
    return reweighter


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_a_used_reweighter_goes_on_alone(engine: Any, how: str) -> None:
    original = _used(engine)
    if how == "deepcopy":
        duplicate = copy.deepcopy(original)
    elif how == "pickle":
        duplicate = pickle.loads(pickle.dumps(original))
    else:
        file = io.BytesIO()
        torch.save(original, file)
        file.seek(0)
        duplicate = torch.load(file, weights_only=False)
    assert duplicate.model is not original.model
    batch, clean = vectors(6), vectors(4)
    expected = original.weights(batch, clean)
    before = [p.grad for p in original.model.parameters()]
    step = assert_exact(duplicate.model, cross_entropy, batch, clean, reweighter=duplicate)
    assert torch.equal(step.weights, expected)
    assert all(p.grad is g for p, g in zip(original.model.parameters(), before, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_used_model_is_copied_pickled_and_saved_like_an_unused_one(engine: Any) -> None:
    model = mlp()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    _used(engine, model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == keys
    x, _ = vectors(3)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x), model(x))
    other = mlp()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_keeps_a_step_alive(engine: Any) -> None:
    """No activation, graph or batch outlives the step; nor does the model its Reweighter."""
    reweighter = _used(engine)
    (x, y), clean = vectors(6), vectors(4)
    alive = weakref.ref(x)
    step = reweighter.backward((x, y), clean)
    del x
    gc.collect()
    assert alive() is None
    assert step.weights.shape == (6,)
    model = weakref.ref(reweighter.model)
    del reweighter
    gc.collect()
    assert model() is None


def test_step_is_pickled() -> None:
    step = _used().backward(vectors(6), vectors(4))
    again = pickle.loads(pickle.dumps(step))
    assert torch.equal(again.weights, step.weights)
    assert (again.engine, again.nonfinite) == (step.engine, step.nonfinite)
    assert torch.equal(again.clean_loss, step.clean_loss)


class _Counter(nn.Module):
    """Counts its forwards in a buffer, in the way that is named."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.head = nn.Linear(5, CLASSES)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.steps.add_(1)
        elif self.how == "replaced":
            self.steps = self.steps + 1
        else:
            self.mean = x.detach().mean(0) if self.mean is None else self.mean * 0.5
        return self.head(x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["in place", "replaced", "made"])
def test_buffers_after_a_step_are_those_of_one_plain_forward(engine: Any, how: str) -> None:
    model = _Counter(how).double()
    plain = copy.deepcopy(model)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(3):
        batch, clean = vectors(6), vectors(4)
        reweighter.explain(batch, clean)
        reweighter.weights(batch, clean)
        expected = truth(model, cross_entropy, batch, clean)
        step = reweighter.backward(batch, clean)
        assert relative_error(step.scores, expected.scores) < 1e-12
        plain(batch[0])
        assert torch.equal(model.steps, plain.steps)
        assert (model.mean is None) == (plain.mean is None)
        if plain.mean is not None:
            assert torch.allclose(model.mean, plain.mean)


@pytest.mark.parametrize("engine", ENGINES)
def test_buffer_that_scales_the_output(engine: Any) -> None:
    """Both forwards start from the same buffers."""

    def forward(model: Any, x: Tensor) -> Tensor:
        out = model.head(x) * model.scale
        model.scale = model.scale * 2
        return out

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.register_buffer("scale", torch.ones((), dtype=torch.float64))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for k in range(3):
        assert float(model.scale) == 2**k
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


@pytest.mark.parametrize("engine", ENGINES)
def test_vectors_of_spectral_norm_advance_once(engine: Any) -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, CLASSES)
    ).double()
    plain = copy.deepcopy(model)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(3):
        batch = vectors(6)
        reweighter.backward(batch, vectors(4))
        plain(batch[0])
        for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, expected)


def test_running_statistics_of_instance_norm() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 2),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).double()
    plain = copy.deepcopy(model)
    batch, clean = vectors(6), vectors(4)
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")
    plain(batch[0])
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_random_numbers_are_drawn_as_in_any_step(engine: Any) -> None:
    """The same seed gives the same sequence of steps; a step advances the generator."""
    runs = []
    batches = [(vectors(6), vectors(4)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES)).double()
    for _ in range(2):
        torch.manual_seed(3)
        reweighter = Reweighter(copy.deepcopy(model), cross_entropy, engine=engine)
        state = torch.get_rng_state()
        runs.append([reweighter.backward(*b).scores for b in batches])
        assert not torch.equal(torch.get_rng_state(), state)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
