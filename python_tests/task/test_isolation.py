"""A step leaves the model and the losses as one training forward does, or as they were."""

from __future__ import annotations

import contextlib
import copy
import enum
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter
from l2rw_ext.task.state import State
from l2rw_ext.tracing.members import Members
from support.feature_table import FEATURES
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_exact, assert_same_state, unchanged

ROWS = {f.name: f for f in FEATURES}


@pytest.mark.parametrize("name", ROWS)
def test_weights_explain_and_interruptions_change_nothing(name: str) -> None:
    """Whatever the model, and in whichever forward the step is interrupted."""
    feature = ROWS[name]
    model, batch, clean = feature.make()
    loss = copy.deepcopy(feature.loss)
    reweighter = Reweighter(model, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for act in (reweighter.weights, reweighter.explain):
            with unchanged(model), unchanged(loss), contextlib.suppress(RuntimeError):
                act(batch, clean)
    calls = last = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    for k in (1, 2):
        calls, last = 0, k
        with unchanged(model), unchanged(loss), pytest.raises(KeyboardInterrupt):
            Reweighter(model, loss, engine=feature.auto or "layerwise").backward(batch, clean)


class _Late(nn.Module):
    """Begins to write to a frozen parameter when it is told to, in the way that is named."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.began = False
        self.head = nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.began and self.how == "in place":
            self.scale.mul_(1.1)
        elif self.began and self.how == "data":
            self.scale.data = self.scale.data * 1.1
        elif self.began:
            self.scale = nn.Parameter(self.scale * 1.1, requires_grad=False)
        return self.head(x * self.scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_later_write_in_place_is_an_error_once(engine: Any) -> None:
    model = _Late("in place").double()
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
    model.began = True
    model.zero_grad()
    head = copy.deepcopy(model.head)
    with pytest.raises(RuntimeError, match=r"wrote to 'scale'.* the next step is watched"):
        reweighter.backward(vectors(6), vectors(4))
    assert_same_state(model.head, head)
    assert model.head.weight.grad is None
    for _ in range(2):
        batch, clean = vectors(6), vectors(4)
        plain = copy.deepcopy(model)
        with unchanged(model):
            reweighter.weights(batch, clean)
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
        plain(batch[0])
        assert_same_state(model, plain)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["data", "replaced"])
def test_a_later_assignment_is_put_back(how: str, engine: Any) -> None:
    model = _Late(how).double()
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for k in range(3):
        model.began = k > 0
        batch, clean = vectors(6), vectors(4)
        plain = copy.deepcopy(model)
        with unchanged(model):
            reweighter.weights(batch, clean)
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
        plain(batch[0])
        assert_same_state(model, plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_in_another_mode_is_no_surprise(engine: Any) -> None:
    """A momentum encoder moves in train mode only, and the first step may be one in eval mode."""
    model = _Late("in place").double().eval()
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    reweighter.weights(vectors(6), vectors(4))
    model.train()
    model.began = True
    for _ in range(2):
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


def test_only_what_is_written_is_copied() -> None:
    model = model_of(
        lambda s, x: s.head(s.base(x) * s.scale.mul_(1.1)),
        base=nn.Linear(5, 5),
        scale=torch.ones(5),
    ).requires_grad_(False)
    model.head = nn.Linear(5, CLASSES).double()
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        reweighter.backward(vectors(6), vectors(4))
        state = State(Members.of(model, written=reweighter._written))
        assert {state._layout.names[i] for i in state._copies} == {"scale"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deleted_name_is_put_back_in_its_place(engine: Any) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        out = model.head(x)
        model.note = "seen"
        del model.gone
        model.register_buffer("new", x.mean(0))
        model.added = nn.Identity()
        return out

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.gone = 3.0
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    batch, (x, y) = vectors(6), vectors(4)
    names = list(vars(model))
    with unchanged(model):
        reweighter.weights(batch, (x, y))
    with unchanged(model), pytest.raises(ValueError, match="is nan"):
        reweighter.backward(batch, (x * float("nan"), y))
    assert list(vars(model)) == names
    assert list(model._modules) == ["head"]


@pytest.mark.parametrize("engine", ENGINES)
def test_attributes_count_one_forward_under_checkpoints(engine: Any) -> None:
    """In plain torch the forward that a backward repeats counts too."""

    def inner(model: Any, x: Tensor) -> Tensor:
        model.count += 1
        return model.head(x)

    part = model_of(inner, head=nn.Linear(5, CLASSES))
    part.count = 0
    model = model_of(lambda s, x: checkpoint(s.inner, x, use_reentrant=False), inner=part)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for k in range(1, 4):
        reweighter.backward(vectors(6), vectors(4))
        assert part.count == k


@pytest.mark.parametrize(
    "act",
    [
        lambda p: p.mul_(2),
        lambda p: p.data.mul_(2),
        lambda p: p.view(-1)[:2].zero_(),
        lambda p: torch._foreach_mul_([p], 2.0),
        lambda p: torch.mul(p, 2, out=p),
        lambda p: p.set_(torch.zeros(5, dtype=torch.float64)),
        lambda p: nn.init.normal_(p),
        lambda p: p.copy_(torch.zeros(5)),
        lambda p: setattr(p, "data", torch.zeros(5, dtype=torch.float64)),
        lambda p: F.batch_norm(torch.randn(4, 5).double(), p, p.abs(), training=True),
    ],
)
def test_ways_to_write(act: Callable[[Tensor], Any]) -> None:
    """Each is undone in the first step and in the next."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            act(model.scale)
        return model.head(x * model.scale)

    model = model_of(forward, scale=torch.rand(5)).requires_grad_(False)
    model.head = nn.Linear(5, CLASSES).double()
    reweighter = Reweighter(model, cross_entropy)
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):
        with unchanged(model):
            reweighter.weights(batch, clean)


def test_a_cache_that_the_first_forward_fills_does_not_keep_batches_apart() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        if model.cache is None:
            model.cache = torch.arange(5.0, dtype=torch.float64)
        return model.head(x + model.cache)

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.cache = None
    reweighter = Reweighter(model, cross_entropy)
    reweighter.explain(vectors(6), vectors(4))
    for _ in range(2):
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
    assert "one merged forward" in reweighter.explain(vectors(6), vectors(4)).passes


def test_a_model_that_counts_its_forwards_is_not_merged_for_long() -> None:
    forwards = []

    def forward(model: Any, x: Tensor) -> Tensor:
        forwards.append(len(x))
        model.count += 1
        return model.head(x)

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.count = 0
    reweighter = Reweighter(model, cross_entropy)
    for k in range(1, 7):
        forwards.clear()
        reweighter.backward(vectors(6), vectors(4))
        assert model.count == k
    assert forwards == [4, 6]


class _Size(enum.Enum):
    SMALL = 1
    LARGE = 2


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attribute_that_follows_the_size_of_the_batch(engine: Any) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.size = _Size.LARGE if len(x) > 6 else _Size.SMALL
        return model.head(x)

    model = model_of(forward, head=nn.Linear(5, CLASSES))
    model.size = _Size.SMALL
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        reweighter.backward(vectors(6), vectors(4))
        assert model.size is _Size.SMALL


def test_a_plain_model_is_still_merged() -> None:
    reweighter = Reweighter(mlp(), cross_entropy)
    reweighter.backward(vectors(6), vectors(4))
    assert "one merged forward" in reweighter.explain(vectors(6), vectors(4)).passes


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_made_under_inference_mode(engine: Any) -> None:
    model = model_of(lambda s, x: s.head(x * s.scale * s.shift), head=nn.Linear(5, CLASSES))
    with torch.inference_mode():
        model.scale = nn.Parameter(torch.rand(5).double(), requires_grad=False)
        model.register_buffer("shift", torch.rand(5).double())
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


def test_sparse_buffers_and_frozen_parameters() -> None:
    model = model_of(
        lambda s, x: s.head(x + torch.sparse.mm(s.a, x.t()).t() + torch.sparse.mm(s.b, x.t()).t()),
        head=nn.Linear(5, CLASSES),
    )
    model.register_buffer("a", torch.eye(5).double().to_sparse())
    model.b = nn.Parameter(torch.eye(5).double().to_sparse(), requires_grad=False)
    reweighter = Reweighter(model, cross_entropy)
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):  # torch cannot copy a sparse parameter
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter, copied=False)


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.written.add_(1)
        self.assigned = self.assigned + 1
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_buffers_of_a_scripted_module(engine: Any) -> None:
    model = nn.Sequential(torch.jit.script(_Scripted()), nn.Linear(5, CLASSES).double())
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for k in range(1, 3):
        reweighter.weights(vectors(6), vectors(4))
        reweighter.backward(vectors(6), vectors(4))
        assert [float(b) for b in model.buffers()] == [k, k]
