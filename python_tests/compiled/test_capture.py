"""Captured steps give what eager steps give: replays on the CPU, CUDA graphs where a device is."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter, Step, devices, ops
from l2rw_ext.compiled import recording
from l2rw_ext.compiled.capture import REHEARSALS, Captures
from l2rw_ext.compiled.watch import Watch
from l2rw_ext.errors import NotCapturableError
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.reference import relative_error
from l2rw_ext.task.isolation import Generators, preserved
from l2rw_ext.tracing.members import Members
from support.device_cases import CASES
from support.feature_table import FEATURES
from support.models import CLASSES, cross_entropy, mlp, model_of, vectors
from support.replays import Recorder

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Of the same operations on other addresses, and of sums that autograd forms in place or not."""

BEFORE = 1 + REHEARSALS
"""Steps of a kind before its capture."""


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The stand-ins that record on the CPU, as if on CUDA, where values are not readable."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(devices, "readable", lambda x: False)
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(ops, name, operator.composition)
    monkeypatch.setattr(Captures, "recorder", staticmethod(recorder))
    return made


def _descend(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad


def _assert_same(step: Step, expected: Step, model: nn.Module, other: nn.Module) -> None:
    """The same result, gradients and buffers."""
    names = ("weights", "scores", "losses", "_clean_loss", "_excluded", "_contaminated")
    pairs = [(name, getattr(step, name), getattr(expected, name)) for name in names]
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        pairs.append((name, p.grad, q.grad))
    for (name, b), c in zip(model.named_buffers(), other.buffers(), strict=True):
        pairs.append((name, b, c))
    for name, found, exact in pairs:
        assert (found is None) == (exact is None), name
        if found is None:
            continue
        assert found.dtype == exact.dtype, name
        finite = exact.isfinite()
        assert torch.equal(found.isfinite(), finite), name
        if finite.any():
            error = relative_error(found[finite].cpu().double(), exact[finite].cpu().double())
            assert error <= (TOLERANCE[exact.dtype] if exact.is_floating_point() else 0), name


class Pair:
    """A captured and an eager reweighter on copies of one model, held to each other."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Any, Any], Tensor] = cross_entropy, **options: Any
    ) -> None:
        self.model, self.near = model, copy.deepcopy(model)
        self.captured = Reweighter(self.model, loss, cuda_graph=True, **options)
        self.eager = Reweighter(self.near, loss, **options)

    def step(self, batch: Any, clean: Any, **options: Any) -> Step:
        """One step of both, from no gradient."""
        for model in (self.model, self.near):
            model.zero_grad()
        step = self.captured.backward(batch, clean, **options)
        _assert_same(step, self.eager.backward(batch, clean, **options), self.model, self.near)
        for model in (self.model, self.near):
            _descend(model)
        return step

    def steps(self, count: int, draw: Callable[[int], Any] = vectors, n: int = 6) -> None:
        """Several steps on new batches."""
        for _ in range(count):
            self.step(draw(n), draw(4))


def _replays(recorders: list[Recorder]) -> list[int]:
    return [graph.count for graph in recorders[0].graphs]


@pytest.mark.parametrize("name", CASES)
def test_replays_are_eager_steps(name: str, recorders: list[Recorder]) -> None:
    case = CASES[name]
    pair = Pair(case.model(), case.loss, engine=case.engine, **case.options)
    n, m = case.sizes
    kept = []
    for i in range(BEFORE + 3):
        batch, clean = case.batch(n), case.batch(m)
        if i == BEFORE + 2 and case.engine == "layerwise" and batch[0].is_floating_point():
            batch[0][1] = math.nan
        step = pair.step(batch, clean)
        kept.append((step.weights, step.weights.clone()))
    assert _replays(recorders) == [3]
    assert recorders[0].warm_ups == REHEARSALS
    for weights, then in kept:  # no later step wrote to them
        assert torch.equal(weights, then)


FEATURES_REPLAYED = {
    "`GRU`, two layers, two directions": "forward",
    "transposed, 2-D": "layerwise",
    "GPT: tied embedding and head, `RMSNorm`, losses of tokens summed": "layerwise",
    "`spectral_norm` by the older hook, in train mode": "layerwise",
}


@pytest.mark.parametrize("name", FEATURES_REPLAYED)
def test_replays_of_features(name: str, recorders: list[Recorder]) -> None:
    """Buffers written by the forward, derived and tied weights."""
    (feature,) = (f for f in FEATURES if f.name == name)
    model, (x, y), clean = feature.make()
    pair = Pair(model, feature.loss, engine=FEATURES_REPLAYED[name])
    for i in range(BEFORE + 2):
        order = torch.arange(len(x)).roll(i)
        pair.step((x[order], y[order]), clean)
    assert _replays(recorders) == [2]


def test_a_checkpoint_and_low_memory(recorders: list[Recorder]) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        hidden = checkpoint(model.body, x, use_reentrant=False, preserve_rng_state=False)
        out: Tensor = model.head(hidden)
        return out

    body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8))
    model = model_of(forward, body=body, head=nn.Linear(8, CLASSES))
    Pair(model, engine="layerwise", low_memory=True).steps(BEFORE + 2)
    assert _replays(recorders) == [2]


def test_python_runs_at_the_capture_alone(recorders: list[Recorder]) -> None:
    calls = []
    model = mlp()
    model.register_forward_hook(lambda *_: calls.append(1))
    reweighter = Reweighter(model, cross_entropy, cuda_graph=True)
    counts = []
    for _ in range(BEFORE + 3):
        reweighter.backward(vectors(6), vectors(4))
        counts.append(len(calls))
    assert counts[BEFORE] > counts[BEFORE - 1]
    assert counts[BEFORE] == counts[-1]
    assert _replays(recorders) == [3]


@pytest.mark.usefixtures("recorders")
def test_gradients_are_handed_out_as_a_backward_does() -> None:
    pair = Pair(mlp())
    pair.steps(BEFORE + 1)
    fired: dict[str, int] = {}
    for name, p in pair.model.named_parameters():

        def count(p: Tensor, name: str = name) -> None:
            fired[name] = fired.get(name, 0) + 1

        p.register_post_accumulate_grad_hook(count)
    for model in (pair.model, pair.near):
        model.zero_grad(set_to_none=True)
    batches = [(vectors(6), vectors(4)) for _ in range(4)]
    handed = None
    for i, pairs in enumerate(batches):
        step, expected = pair.captured.backward(*pairs), pair.eager.backward(*pairs)
        _assert_same(step, expected, pair.model, pair.near)
        first = next(pair.model.parameters()).grad
        if i == 0:
            handed = first
        elif i < 3:
            assert first is handed  # added to, in place
        if i == 2:
            for model in (pair.model, pair.near):
                model.zero_grad(set_to_none=False)
            assert handed is not None
            assert not handed.any()
    assert fired == dict.fromkeys(fired, 4)
    assert len(fired) == 4


@pytest.mark.usefixtures("recorders")
def test_what_was_handed_out_is_not_written_again() -> None:
    pair = Pair(mlp())
    pair.steps(BEFORE + 1)
    pair.model.zero_grad()
    pair.captured.backward(vectors(6), vectors(4))
    kept = [p.grad for p in pair.model.parameters()]
    before = [g.clone() for g in kept if g is not None]
    pair.model.zero_grad()
    pair.captured.backward(vectors(6), vectors(4))
    for g, then, p in zip(kept, before, pair.model.parameters(), strict=True):
        assert g is not None
        assert torch.equal(g, then)
        assert p.grad is not g


def test_each_kind_of_step_has_its_graph(recorders: list[Recorder]) -> None:
    pair = Pair(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)).double())
    for n in (6, 3):
        pair.steps(BEFORE + 1, n=n)
    pair.steps(2)
    assert _replays(recorders) == [3, 1]
    for model in (pair.model, pair.near):
        model.get_submodule("0").requires_grad_(False)
    pair.steps(BEFORE + 1)
    assert _replays(recorders) == [3, 1, 1]
    for model in (pair.model, pair.near):
        model.get_submodule("0").requires_grad_(True)
        model.eval()
    pair.steps(BEFORE + 1)
    assert _replays(recorders) == [3, 1, 1, 1]
    for model in (pair.model, pair.near):
        model.train()
    pair.steps(1)
    assert _replays(recorders) == [4, 1, 1, 1]


@pytest.mark.usefixtures("recorders")
def test_too_many_kinds_of_steps() -> None:
    reweighter = Reweighter(mlp(), cross_entropy, cuda_graph=True)
    for n in range(2, 18):
        reweighter.backward(vectors(n), vectors(4))
    with pytest.raises(NotCapturableError, match=r"17th kind of step.* pad the batches"):
        reweighter.backward(vectors(18), vectors(4))
    reweighter.backward(vectors(17), vectors(4))


def test_parameters_that_were_exchanged(recorders: list[Recorder]) -> None:
    pair = Pair(mlp())
    pair.steps(BEFORE + 1)
    for model in (pair.model, pair.near):
        for p in model.parameters():
            p.data = p.data * 2
    pair.steps(BEFORE + 1)
    for model in (pair.model, pair.near):
        model.load_state_dict({k: v.neg() for k, v in model.state_dict().items()})
    pair.steps(2)
    assert _replays(recorders) == [1, 3]
    new = nn.Linear(8, CLASSES).double()
    for model in (pair.model, pair.near):
        model._modules["2"] = copy.deepcopy(new)
    pair.steps(BEFORE + 1)
    assert _replays(recorders) == [1, 3, 1]


@pytest.mark.usefixtures("recorders")
def test_parameters_that_are_exchanged_all_the_time() -> None:
    pair = Pair(mlp())
    for _ in range(9):
        pair.steps(1)
        for p in pair.model.parameters():
            p.data = p.data.clone()
    with pytest.raises(NotCapturableError, match=r"changed 9 times.* in place"):
        pair.steps(1)


def test_plans_are_checked_when_they_are_due(recorders: list[Recorder]) -> None:
    calls = []
    pair = Pair(mlp())
    pair.model.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for _ in range(20):
        before = len(calls)
        pair.steps(1)
        seen.append(len(calls) > before)
    assert [i for i, ran in enumerate(seen) if ran] == [*range(BEFORE + 1), 16, 17]
    assert _replays(recorders) == [20 - BEFORE - 2]


@pytest.mark.usefixtures("recorders")
@pytest.mark.parametrize("engine", ["layerwise", "forward"])
def test_numbers_that_python_has_changed_are_found_out(engine: Any) -> None:
    model = mlp()
    model.insert(1, nn.Dropout(0.25))
    reweighter = Reweighter(model, cross_entropy, engine=engine, cuda_graph=True)
    for _ in range(12):
        reweighter.backward(vectors(6), vectors(4))
    model.get_submodule("1").p = 0.5
    later = 17 if engine == "layerwise" else 16
    for _ in range(12, later):
        reweighter.backward(vectors(6), vectors(4))
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):
        state = _State(model)
        with pytest.raises(NotCapturableError, match=r"changes, at .*other numbers"):
            reweighter.backward(batch, clean)
        state.check()


def test_a_model_that_has_changed_is_found_out_when_the_plan_is_due(
    recorders: list[Recorder],
) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        out: Tensor = model.linear(x)
        return out + out.mean(0) if model.linear.coupled else out

    model = model_of(forward, linear=nn.Linear(5, CLASSES))
    model.linear.coupled = False
    pair = Pair(model, engine="auto")
    pair.steps(BEFORE + 2)
    for copied in (pair.model, pair.near):
        copied.linear.coupled = True
    for _ in range(16 - BEFORE - 2):  # replays do not run Python
        pair.captured.backward(vectors(6), vectors(4))
    pair.near.load_state_dict(pair.model.state_dict())
    pair.steps(BEFORE + 2)
    assert pair.step(vectors(6), vectors(4)).engine == "forward"
    assert len(recorders[0].graphs) == 2


@pytest.mark.usefixtures("recorders")
@pytest.mark.parametrize("engine", ["layerwise", "forward"])
def test_replays_draw_fresh_masks(engine: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Linear(32, CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy, engine=engine, cuda_graph=True)
    batch, clean = vectors(6), vectors(4)
    losses = [reweighter.backward(batch, clean).losses for _ in range(BEFORE + 4)]
    for i, a in enumerate(losses):
        assert not any(torch.equal(a, b) for b in losses[:i])


OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {"l2": 0.1},
    "layers": {"layers": ["2"]},
    "clean loss": {"clean_loss_fn": lambda out, y: 2 * cross_entropy(out, y).square()},
    "low memory, forward": {"low_memory": True, "engine": "forward"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, recorders: list[Recorder]) -> None:
    Pair(mlp(), **OPTIONS[name]).steps(BEFORE + 3)
    assert _replays(recorders) == [3]


def test_a_loss_scale_and_an_overflow(recorders: list[Recorder]) -> None:
    pair = Pair(mlp(dtype=torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale, which is updated below
    for i in range(BEFORE + 4):
        if i == BEFORE + 2:
            scaler.update(1e6)
        if i == BEFORE + 3:
            scaler.update(1e38)
        batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
        pair.step(batch, clean, grad_scaler=scaler)
        if i == BEFORE + 3:
            gradient = next(pair.model.parameters()).grad
            assert gradient is not None
            assert not gradient.isfinite().any()
    assert _replays(recorders) == [4]


@pytest.mark.usefixtures("recorders")
def test_scores_are_recorded_by_index() -> None:
    pair = Pair(mlp())
    for i in range(BEFORE + 3):
        pair.step(vectors(6), vectors(4), index=torch.arange(6) + i)
    assert torch.equal(pair.captured.record.visits, pair.eager.record.visits)
    assert torch.equal(pair.captured.record.mean_scores, pair.eager.record.mean_scores)


def test_autocast_is_part_of_the_kind(recorders: list[Recorder]) -> None:
    pair = Pair(mlp(dtype=torch.float32))
    for _ in range(BEFORE + 2):
        pair.step(vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            pair.step(vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32))
    assert _replays(recorders) == [2, 2]


@pytest.mark.usefixtures("recorders")
def test_weights_and_explain_run_as_ever() -> None:
    pair = Pair(mlp())
    batch, clean = vectors(6), vectors(4)
    assert "the first step runs as it is" in str(pair.captured.explain(batch, clean))
    pair.steps(1)
    assert "about to be captured" in str(pair.captured.explain(batch, clean))
    pair.steps(BEFORE)
    assert "are replayed from a graph" in str(pair.captured.explain(batch, clean))
    assert torch.equal(pair.captured.weights(batch, clean), pair.eager.weights(batch, clean))
    pair.steps(1)


def test_inputs_of_a_dict_with_a_mask_for_both_batches(recorders: list[Recorder]) -> None:
    model = model_of(
        lambda m, x, mask, scale, name: m.linear(x * mask) * scale, linear=nn.Linear(5, CLASSES)
    )
    pair = Pair(model)
    for _ in range(BEFORE + 3):
        mask = torch.randint(2, (5,)).double()
        (x, y), (x_clean, y_clean) = vectors(6), vectors(4)
        shared = {"mask": mask, "scale": 0.5, "name": None}
        # Not contiguous, and twice as long: nothing of a batch's own memory is relied on.
        pair.step(({"x": x.repeat(1, 2)[:, :5], **shared}, y), ({"x": x_clean, **shared}, y_clean))
    assert _replays(recorders) == [3]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_starts_without_graphs(how: str, recorders: list[Recorder]) -> None:
    reweighter = Reweighter(mlp(), cross_entropy, cuda_graph=True)
    for _ in range(BEFORE + 1):
        reweighter.backward(vectors(6), vectors(4))
    state = reweighter.state_dict()
    assert set(state) == {"direction", "record"}
    duplicate: Reweighter = (
        copy.deepcopy(reweighter) if how == "deepcopy" else pickle.loads(pickle.dumps(reweighter))
    )
    batch, clean = vectors(6), vectors(4)
    for _ in range(BEFORE + 1):
        weights = duplicate.backward(batch, clean).weights
    assert torch.equal(weights, reweighter.backward(batch, clean).weights)
    assert [len(r.graphs) for r in recorders] == [1, 1]


def test_no_batch_is_kept_alive_and_no_model(recorders: list[Recorder]) -> None:
    reweighter = Reweighter(mlp(), cross_entropy, cuda_graph=True)
    for _ in range(BEFORE + 2):
        x, y = vectors(6)
        reweighter.backward((x, y), vectors(4))
        alive = weakref.ref(x)
        del x
        gc.collect()
        assert alive() is None
    model = weakref.ref(reweighter.model)
    del reweighter
    recorders.clear()
    gc.collect()
    assert model() is None


# What cannot be captured.


class _State:
    """What a step that fails leaves as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {k: v.clone() for k, v in model.state_dict().items()}
        self._gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self._buffers = list(model.buffers())
        self._generators = Generators({p.device for p in model.parameters()})

    def check(self) -> None:
        """Nothing has changed."""
        for name, x in self._model.state_dict().items():
            assert torch.equal(x, self._tensors[name]), name
        for p, g in zip(self._model.parameters(), self._gradients, strict=True):
            assert (p.grad is None) == (g is None)
            assert p.grad is None or torch.equal(p.grad, g)
        for now, then in zip(self._model.buffers(), self._buffers, strict=True):
            assert now is then
        assert self._generators.unchanged()


def _normed(fn: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A model with batch statistics and dropout, whose outputs go through ``fn``."""
    body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, CLASSES))
    model = model_of(lambda m, x: fn(m, m.body(x)), body=body)
    model.register_buffer("seen", torch.zeros((), dtype=torch.float64))
    model.count = 0
    model.table = torch.ones(CLASSES, dtype=torch.float64)
    return model


def _reads(model: Any, x: Tensor) -> Tensor:
    return x * 2 if x.detach().sum().item() > 0 else x


def _catches(model: Any, x: Tensor) -> Tensor:
    try:
        return _reads(model, x)
    except RuntimeError:
        return x


def _counts(model: Any, x: Tensor) -> Tensor:
    model.count += 1
    return x * (1 + 1 / model.count)


def _grows(model: Any, x: Tensor) -> Tensor:
    model.count += 1
    for _ in range(model.count):
        x = x + 1
    return x


def _assigns(model: Any, x: Tensor) -> Tensor:
    model.seen = model.seen + 1
    return x


def _exchanges(model: Any, x: Tensor) -> Tensor:
    model.kept = [*getattr(model, "kept", []), model.table]
    model.table = model.table * 1
    return x * model.kept[-1]


_GENERATOR = torch.Generator()


def _draws(model: Any, x: Tensor) -> Tensor:
    return x + torch.rand(x.shape, generator=_GENERATOR, dtype=x.dtype)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "reads": (_reads, "makes the host wait for values"),
    "catches": (_catches, "makes the host wait for values"),
    "counts": (_counts, r"changes, at aten\.mul.*\(other numbers"),
    "grows": (_grows, "changes, at"),
    "assigns": (_assigns, "another tensor to 'seen'.* in place"),
    "exchanges": (_exchanges, "uses a tensor that was exchanged"),
    "draws": (_draws, "generator of its own"),
    "copies from the host": (
        lambda m, x: x + torch.tensor([1.0], device=x.device),
        "makes the host wait",
    ),
    "chooses rows": (lambda m, x: x + x[x[:, 0] > 1e9].sum(), "makes the host wait"),
}


def _refusal(
    reweighter: Reweighter, draw: Callable[[int], Any]
) -> tuple[NotCapturableError, _State]:
    """The error of the first step that is refused, and the state before it."""
    for _ in range(BEFORE + 1):
        batch, clean = draw(6), draw(4)
        state = _State(reweighter.model)
        try:
            reweighter.backward(batch, clean)
        except NotCapturableError as error:
            return error, state
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused(name: str, recorders: list[Recorder]) -> None:
    fn, message = REFUSED[name]
    model = _normed(fn)
    reweighter = Reweighter(model, cross_entropy, engine="forward", cuda_graph=True)
    error, state = _refusal(reweighter, vectors)
    assert re.match(f"cuda_graph=True: .*{message}", str(error))
    assert str(error).endswith("leave cuda_graph off")
    state.check()
    assert not any(r.graphs for r in recorders)


@pytest.mark.usefixtures("recorders")
def test_values_that_decide_are_refused() -> None:
    model = model_of(
        lambda m, x: m.linear(x).gather(0, x[:, :1].argsort(0).argsort(0).expand(-1, CLASSES)),
        linear=nn.Linear(5, CLASSES),
    )
    reweighter = Reweighter(model, cross_entropy, engine="layerwise", cuda_graph=True)
    batch, clean = vectors(6), vectors(4)
    for x, _ in (batch, clean):
        x[:, 0] = torch.arange(len(x))
    reweighter.backward(batch, clean)
    state = _State(model)
    with pytest.raises(NotCapturableError, match=r"which examples gather .* look at each step"):
        reweighter.backward(batch, clean)
    state.check()


def test_a_capture_that_fails(recorders: list[Recorder]) -> None:
    model = _normed(lambda m, x: x)
    reweighter = Reweighter(model, cross_entropy, engine="forward", cuda_graph=True)
    for _ in range(BEFORE):
        reweighter.backward(vectors(6), vectors(4))
    recorders[0].failures.append(RuntimeError("operation not permitted\nwhen stream is capturing"))
    batch, clean = vectors(6), vectors(4)
    state = _State(model)
    for _ in range(2):
        with pytest.raises(
            NotCapturableError, match=r"the capture failed \(operation not permitted\); leave"
        ):
            reweighter.backward(batch, clean)
        state.check()
    assert not recorders[0].graphs
    assert "the capture failed" in str(reweighter.explain(batch, clean))
    state.check()


@pytest.mark.usefixtures("recorders")
def test_a_batch_that_a_graph_cannot_read() -> None:
    model = model_of(lambda m, x, other: m.linear(x), linear=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, cross_entropy, cuda_graph=True)
    (x, y), (x_clean, y_clean) = vectors(6), vectors(4)
    for other, message in (
        (object(), "the batches hold a object"),
        (torch.ones(6, device="meta"), "a tensor of the batches is on meta"),
        (torch.ones(6, 2).to_sparse(), "of layout torch.sparse_coo"),
    ):
        with pytest.raises(NotCapturableError, match=message):
            reweighter.backward(((x, other), y), ((x_clean, other), y_clean))


@pytest.mark.usefixtures("recorders")
def test_wrappers_that_work_in_python() -> None:
    class DistributedDataParallel(nn.Sequential):
        pass

    reweighter = Reweighter(DistributedDataParallel(mlp()), cross_entropy, cuda_graph=True)
    with pytest.raises(NotCapturableError, match="works in Python in each step; leave"):
        reweighter.backward(vectors(6), vectors(4))


def test_a_model_on_the_cpu() -> None:
    reweighter = Reweighter(mlp(), cross_entropy, cuda_graph=True)
    with pytest.raises(RuntimeError, match=r"parameters are on cpu; move the model to one CUDA"):
        reweighter.backward(vectors(6), vectors(4))
    assert reweighter.weights(vectors(6), vectors(4)).shape == (6,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every", 2),
        ("direction_decay", 0.5),
        ("check_finite", True),
        ("on_degenerate", "skip"),
        ("on_degenerate", "uniform"),
    ],
)
def test_options_that_wait_or_alternate(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"cuda_graph=True cannot be combined with {name}: "):
        Reweighter(mlp(), cross_entropy, cuda_graph=True, **{name: value})


def test_an_optimizer_whose_steps_count() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="combined with preconditioner"):
        Reweighter(model, cross_entropy, cuda_graph=True, preconditioner=optimizer)


def test_accumulation_is_refused() -> None:
    reweighter = Reweighter(mlp(), cross_entropy, cuda_graph=True)
    with pytest.raises(RuntimeError, match=r"accumulate\(\)"), reweighter.accumulate():
        pass


def test_a_watched_step_keeps_to_one_device() -> None:
    x = torch.ones(3, device="meta")
    with Watch(x.device):
        assert (x + x).shape == (3,)
        with pytest.raises(NotCapturableError, match="meets tensors on cpu and meta; keep all"):
            _ = x * torch.ones(())
        with pytest.raises(NotCapturableError, match="meets tensors on cpu and meta"):
            torch.ones(3).to("meta")


def test_the_numbers_of_a_watched_attention_count() -> None:
    q = torch.ones(1, 1, 3, 4)

    def watched(scale: float, q: Tensor = q) -> Watch:
        with Watch(q.device) as watch:
            nn.functional.scaled_dot_product_attention(q, q, q, scale=scale)
        return watch

    watched(0.5).check_same(watched(0.5))
    with pytest.raises(NotCapturableError, match=r"_attention.*numbers"):
        watched(0.5).check_same(watched(0.25))
    with pytest.raises(NotCapturableError, match="uses a tensor that was exchanged"):
        watched(0.5).check_same(watched(0.5, q.clone()))


def test_a_recorded_step_leaves_generators_of_devices_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the state of a device's generator is read or written")

    monkeypatch.setattr(Members, "devices", lambda self: {torch.device("cuda", 0)})
    monkeypatch.setattr(torch.cuda, "get_rng_state", refused)
    monkeypatch.setattr(torch.cuda, "set_rng_state", refused)
    model = _normed(lambda m, x: x)
    members = Members.of(model)
    buffer = model.seen

    def fail() -> None:
        with preserved(members, always=False, captured=True) as snapshot:
            snapshot.mark_generators()
            model.seen = torch.ones(())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.seen is buffer


class _Cuda:
    """Stands for the parts of ``torch.cuda`` that a recorder calls, and writes down the calls."""

    def __init__(self, *, end_fails: bool, was_told: bool = False) -> None:
        self.end_fails = end_fails
        self.was_told = was_told
        self.log: list[Any] = []

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of torch's."""
        cuda = torch.cuda
        for name in ("synchronize", "empty_cache"):
            patch.setattr(cuda, name, lambda *_, name=name: self.log.append(name))
        patch.setattr(cuda, "CUDAGraph", lambda: self)
        patch.setattr(cuda, "graph_pool_handle", lambda: (0, 7))
        patch.setattr(cuda, "Stream", lambda device: "a stream")
        patch.setattr(cuda, "stream", self._on)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            called = lambda *a, name=name: self._called(name, *a)  # noqa: E731
            patch.setattr(torch._C, name, called, raising=False)

    def _called(self, name: str, *arguments: object) -> None:
        self.log.append((name, *arguments))
        if name == "_cuda_endAllocateToPool" and self.was_told:
            raise RuntimeError("not recording to this pool")

    @contextlib.contextmanager
    def _on(self, stream: object) -> Iterator[None]:
        self.log.append("enter")
        try:
            yield
        finally:
            self.log.append("leave")

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.log.append(("begin", pool, capture_error_mode))

    def capture_end(self) -> None:
        self.log.append("end")
        if self.end_fails:
            raise RuntimeError("the capture was invalidated")

    def reset(self) -> None:
        self.log.append("reset")

    def replay(self) -> None:
        self.log.append("replay")


@pytest.mark.parametrize(("end_fails", "was_told"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_recorder_ends_what_it_began(
    fails: bool, end_fails: bool, was_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = _Cuda(end_fails=end_fails, was_told=was_told)
    cuda.patch(monkeypatch)
    monkeypatch.setattr(recording, "_BROKEN", [])
    collects = gc.isenabled()

    def call() -> int:
        assert not gc.isenabled()
        if fails:
            raise KeyError
        return 3

    recorder = recording.Recorder(torch.device("cuda", 1))
    begun = ["synchronize", "empty_cache", "enter", ("begin", (0, 7), "thread_local")]
    if not fails and not end_fails:
        assert recorder.record(call).replay() == 3
        assert cuda.log == [*begun, "end", "leave", "replay"]
    else:
        with pytest.raises(KeyError if fails else RuntimeError):
            recorder.record(call)
        tried = ["end"] * (1 + (end_fails and not fails))
        names = ("_cuda_endAllocateToPool", "_cuda_releasePool")[: 1 if was_told else 2]
        told = [(name, 1, (0, 7)) for name in names] if end_fails else []
        # A capture of nothing, for the sake of the generator.
        again = [*begun[2:], "end", "leave"] if end_fails else []
        assert cuda.log == [*begun, *tried, *told, *again, "reset", "leave"]
    assert len(recording._BROKEN) == end_fails
    assert gc.isenabled() == collects


class _Stream:
    """Stands for a stream, and writes down what it waits for."""

    def __init__(self) -> None:
        self.waits_for: list[_Stream] = []

    def wait_stream(self, other: _Stream) -> None:
        self.waits_for.append(other)


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other = _Stream(), _Stream(), _Stream()
    now = [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    recorder = recording.Recorder(torch.device("cuda", 0))
    for stream in (first, first, second, second):
        now.append(stream)
        recorder.join()
    assert (first.waits_for, second.waits_for) == ([], [first])

    @contextlib.contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: other)
    monkeypatch.setattr(torch.cuda, "stream", on)
    assert recorder.warm_up(lambda: now[-1]) is other
    assert (other.waits_for, second.waits_for) == ([second], [first, other])


# On a device.


def _cuda(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.cuda(), tree)


class CudaPair(Pair):
    """On the device, with batches drawn on the host; gradients as the test left them."""

    def step(self, batch: Any, clean: Any, **options: Any) -> Step:
        """One step of both, held to each other."""
        step = self.captured.backward(_cuda(batch), _cuda(clean), **options)
        expected = self.eager.backward(_cuda(batch), _cuda(clean), **options)
        _assert_same(step, expected, self.model, self.near)
        return step


def _recorded(reweighter: Reweighter) -> list[bool]:
    assert reweighter._captures is not None
    return [kind._recording is not None for kind in reweighter._captures._kinds.values()]


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_replays_on_cuda_are_eager_steps(name: str) -> None:
    case = CASES[name]
    pair = CudaPair(case.model().cuda(), case.loss, engine=case.engine, **case.options)
    n, m = case.sizes
    kept = []
    for _ in range(BEFORE + 3):
        for model in (pair.model, pair.near):
            model.zero_grad()
        step = pair.step(case.batch(n), case.batch(m))
        kept.append((step.weights, step.weights.clone()))
    assert _recorded(pair.captured) == [True]
    for weights, then in kept:
        assert torch.equal(weights, then)


@pytest.mark.cuda
def test_a_replayed_step_on_cuda_does_not_synchronise() -> None:
    pair = CudaPair(mlp().cuda())
    for _ in range(BEFORE + 1):
        pair.step(vectors(6), vectors(4))
    batch, clean = _cuda(vectors(6)), _cuda(vectors(4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = pair.captured.backward(batch, clean)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = pair.eager.backward(batch, clean)
    _assert_same(step, expected, pair.model, pair.near)


@pytest.mark.cuda
def test_shapes_streams_and_gradients_on_cuda() -> None:
    pair = CudaPair(mlp().cuda())
    for n in (6, 3):
        for i in range(BEFORE + 4):
            for model in (pair.model, pair.near):
                if i % 3:
                    model.zero_grad(set_to_none=i % 3 == 1)
            stream = torch.cuda.Stream() if i % 2 else None
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                pair.step(vectors(n), vectors(4))
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
    assert _recorded(pair.captured) == [True, True]


@pytest.mark.cuda
def test_replays_on_cuda_draw_fresh_masks() -> None:
    model = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Linear(32, CLASSES)).double()
    reweighter = Reweighter(model.cuda(), cross_entropy, cuda_graph=True)
    batch, clean = _cuda(vectors(6)), _cuda(vectors(4))
    losses = [reweighter.backward(batch, clean).losses for _ in range(BEFORE + 4)]
    for i, a in enumerate(losses):
        assert not any(torch.equal(a, b) for b in losses[:i])
    assert _recorded(reweighter) == [True]


@pytest.mark.cuda
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_on_cuda_leave_the_device_as_it_was(name: str) -> None:
    model = _normed(REFUSED[name][0]).cuda()
    model.table = model.table.cuda()
    reweighter = Reweighter(model, cross_entropy, engine="forward", cuda_graph=True)
    stream = torch.cuda.current_stream()
    _, state = _refusal(reweighter, lambda n: _cuda(vectors(n)))
    state.check()
    assert torch.cuda.current_stream() == stream
    _works_on_cuda()


@pytest.mark.cuda
def test_a_capture_that_fails_on_cuda() -> None:
    """What is not seen before the capture: here, a wait that goes past torch's operations."""

    def forward(model: Any, x: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return x

    model = _normed(forward).cuda()
    reweighter = Reweighter(model, cross_entropy, engine="forward", cuda_graph=True)
    for _ in range(BEFORE):
        reweighter.backward(_cuda(vectors(6)), _cuda(vectors(4)))
    batch, clean = _cuda(vectors(6)), _cuda(vectors(4))
    state = _State(model)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(NotCapturableError, match="the capture failed"):
            reweighter.backward(batch, clean)
    assert torch.cuda.current_stream() == stream
    state.check()
    _works_on_cuda()


def _works_on_cuda() -> None:
    """Random numbers, memory and another capture."""
    assert torch.rand(8, device="cuda").isfinite().all()
    pair = CudaPair(mlp().cuda())
    for _ in range(BEFORE + 2):
        pair.step(vectors(6), vectors(4))
    assert _recorded(pair.captured) == [True]
