"""Merged steps in which ranks exchange the direction layer by layer."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from l2rw_ext import Explanation, Reweighter, Step
from l2rw_ext.distributed import exchange
from l2rw_ext.distributed.exchange import Exchange, Message
from l2rw_ext.distributed.group import Processes
from l2rw_ext.engines.base import Scored
from l2rw_ext.engines.layerwise import scoring
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.errors import NotExactError, RankError
from l2rw_ext.reference import relative_error
from support.models import CLASSES, Mean, cross_entropy, model_of, vectors
from support.oracle import EXACT, flat, gradients_of, truth_of_ranks, zero_grad
from support.processes import Pool
from support.ranks import MODELS, SIZES, ScaledCrossEntropy, union


def _derived() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Linear(8, CLASSES))


def _recurrent() -> nn.Module:
    return model_of(
        lambda s, x: s.head(s.lstm(x)[0].mean(1)),
        lstm=nn.LSTM(5, 6, batch_first=True, bidirectional=True),
        head=nn.Linear(12, CLASSES),
    )


def _wide() -> nn.Module:
    layers = (nn.Linear(5, 200), nn.Tanh(), nn.Linear(200, 200), Mean(last=True))
    return nn.Sequential(*layers, nn.Linear(200, CLASSES))


def _optional() -> nn.Module:
    model = model_of(
        lambda s, x: s.a(x) + s.b(x) if s.both else s.a(x),
        a=nn.Linear(5, CLASSES),
        b=nn.Linear(5, CLASSES),
    )
    model.both = True
    return model


def _deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)), nn.Linear(5, CLASSES))


def _long(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    **MODELS,
    "wide": (_wide, _long),
    "derived": (_derived, vectors),
    "recurrent": (_recurrent, _long),
    "optional": (_optional, vectors),
    "deep": (_deep, vectors),
}

MERGED = ["mlp", "convolutions", "tokens", "shared", "checkpointed", "wide", "derived", "recurrent"]


@dataclass
class _Told:
    """What a rank says of a step."""

    step: Step
    clean_loss: Tensor
    gradients: dict[str, Tensor | None]
    explanation: Explanation | None
    """Of the merged pass, if it was one."""
    messages: list[tuple[bool, int]]
    """Whether a collective of the merged pass gathers, and the bytes that this rank hands over."""


class _Rank:
    """A model and its reweighter, which tells of the merged passes that it makes."""

    def __init__(self, group: Any, model: str, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = OWN[model][0]().double()
        self.loss = options.pop("loss", lambda: cross_entropy)()
        self.reweighter = Reweighter(self.model, self.loss, process_group=group, **options)
        self.merged: list[Scored | None] = []
        self.messages: list[tuple[bool, int]] = []
        self._score = self.reweighter._layerwise.score_with_others
        # Watched for as long as this rank lives, which no context of a mock does.
        self.reweighter._layerwise.score_with_others = self._watched  # type: ignore[method-assign]

    def _watched(self, *args: Any) -> Scored | None:
        self.messages.clear()
        with _counted(self.messages):
            self.merged.append(self._score(*args))
        return self.merged[-1]

    def backward(self, batch: Any, clean: Any, **options: Any) -> _Told:
        zero_grad(self.model, self.loss)
        step = self.reweighter.backward(batch, clean, **options)
        scored = self.merged[-1]
        return _Told(
            replace(step, _union=None),
            step.clean_loss,
            gradients_of(self.model, self.loss),
            None if scored is None else scored.explain(),
            self.messages[:],
        )


@contextlib.contextmanager
def _counted(messages: list[tuple[bool, int]]) -> Iterator[None]:
    """A context in which the collectives of a backward say what they are given."""
    reduce, gather = dist.all_reduce, exchange.all_gather

    def all_reduce(x: Tensor, **kwargs: Any) -> Any:
        messages.append((False, x.nbytes))
        return reduce(x, **kwargs)

    def all_gather(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):
            messages.append((True, x.nbytes))
        return gather(out, x, **kwargs)

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(exchange, "all_gather", all_gather),
    ):
        yield


def _steps(
    group: dist.ProcessGroup, model: str, steps: Sequence[Any], options: dict[str, Any]
) -> list[_Told]:
    rank = _Rank(group, model, **options)
    return [rank.backward(*own[dist.get_rank(group)]) for own in steps]


def _batches(model: str, sizes: Sequence[tuple[int, int]], steps: int) -> list[Any]:
    torch.manual_seed(0)
    make = OWN[model][1]
    return [[(make(n), make(m) if m else None) for n, m in sizes] for _ in range(steps)]


def _assert_exact(
    found: list[list[_Told]],
    model: str,
    steps: Sequence[Any],
    tolerance: float = EXACT,
    loss: Any = lambda: cross_entropy,
) -> None:
    """Each step is the oracle's on the union of all batches."""
    torch.manual_seed(1)
    inner, loss = OWN[model][0]().double(), loss()
    for k, step in enumerate(steps):
        batches, cleans = zip(*step, strict=True)
        expected = truth_of_ranks(inner, loss, batches, cleans)
        for told, t in zip((told[k] for told in found), expected, strict=True):
            assert relative_error(told.step.scores, t.scores) <= tolerance
            assert relative_error(told.step.weights, t.weights) <= tolerance
            assert relative_error(told.clean_loss, t.clean_loss) <= tolerance
            gradients = flat(told.gradients.values())
            assert relative_error(gradients, flat(t.gradients.values())) <= tolerance


def _merged(found: list[list[_Told]]) -> list[bool]:
    """Which steps were merged, on all ranks or on none."""
    (merged,) = {tuple(told.explanation is not None for told in rank) for rank in found}
    return list(merged)


def _assert_merged(
    pool: Pool,
    model: str,
    steps: Sequence[Any],
    run: Callable[..., list[_Told]] = _steps,
    **options: Any,
) -> list[list[_Told]]:
    """Each step is exact, and all are merged but the first, which is not worth a plan."""
    found = pool.run(run, model, steps, options, ranks=len(steps[0]))
    _assert_exact(found, model, steps, loss=options.get("loss", lambda: cross_entropy))
    assert _merged(found) == [False] + [True] * (len(steps) - 1)
    return found


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("model", MERGED)
def test_a_merged_step_is_that_of_the_union(
    pool: Pool, model: str, ranks: int, low_memory: bool
) -> None:
    steps = _batches(model, SIZES["uneven"][:ranks], 3)
    _assert_merged(pool, model, steps, low_memory=low_memory)


def test_a_loss_with_parameters(pool: Pool) -> None:
    _assert_merged(pool, "mlp", _batches("mlp", SIZES["uneven"], 2), loss=ScaledCrossEntropy)


@pytest.mark.parametrize("model", ["mlp", "wide", "tokens", "derived", "recurrent"])
def test_what_is_sent_is_what_the_plan_says(pool: Pool, model: str) -> None:
    """Bytes follow from what ranks hand over by the ring algorithms."""
    for told in _assert_merged(pool, model, _batches(model, SIZES["uneven"], 2)):
        messages = told[1].messages
        assert any(gathered for gathered, _ in messages) is (model == "wide")
        explanation = told[1].explanation
        assert explanation is not None
        sent = sum(size * (2 if gathered else 4 / 3) for gathered, size in messages)
        sent -= 8 * 4 / 3  # the clean loss, which goes with the first of them
        assert explanation.as_dict()["sent_bytes"] == pytest.approx(sent)
        ways = {layer.direction for layer in explanation.layers}
        assert ("gathered" in ways) is (model == "wide")
        assert ("reduced at the end" in ways) is (model in ("tokens", "derived"))
        assert all(way in str(explanation) for way in ways)


def _in_groups(*args: Any) -> list[_Told]:
    """Steps whose uses in factored form are scored in one call, as on CUDA."""
    with mock.patch.object(scoring, "in_groups", return_value=True):
        return _steps(*args)


def test_uses_that_are_scored_in_one_call(pool: Pool) -> None:
    _assert_merged(pool, "wide", _batches("wide", SIZES["uneven"], 2), _in_groups)


def _slowly(*args: Any) -> list[_Told]:
    """Steps in which nothing arrives until it is waited for; says how much has waited."""
    most = 0
    original = Scoring._score_first

    def score_first(self: Scoring) -> None:
        nonlocal most
        most = max(most, len(self._waiting))
        original(self)

    with (
        mock.patch.object(Exchange, "arrived", lambda self, key, due=False: due),
        mock.patch.object(Scoring, "_score_first", score_first),
    ):
        told = _steps(*args)
    told[-1].messages.append((False, most))
    return told


@pytest.mark.parametrize(("low_memory", "most"), [(False, 5), (True, 3)])
def test_no_more_waits_than_is_kept_anyway(pool: Pool, low_memory: bool, most: int) -> None:
    steps = _batches("deep", SIZES["uneven"], 2)
    for told in _assert_merged(pool, "deep", steps, _slowly, low_memory=low_memory):
        assert told[-1].messages[-1] == (False, most)


def _out_of_order(group: dist.ProcessGroup) -> list[float]:
    """Messages that one rank sends in another order than the others."""
    exchange = Exchange(Processes(group))
    rank = dist.get_rank(group)
    exchange.agree(1, 1 + rank, "structure", f"positions {rank}")
    messages = [
        Message(("use", k), 1 + k, torch.float64, torch.device("cpu"), 3, gathered=k == 2)
        for k in range(3)
    ]
    messages[2] = replace(messages[2], numel=6)
    exchange.begin(messages)
    for k in (2, 0, 1) if rank else range(3):
        rows = 1 + rank if k == 2 else 1 + k
        assert exchange.arrived(("use", k), due=True) is False
        exchange.send(("use", k), [torch.full((rows, 2 if k == 2 else 1), 1.0 + rank).double()])
    return [float(x.sum()) for k in range(3) for x in exchange.take(("use", k))]


def test_collectives_begin_in_the_order_of_the_plan(pool: Pool) -> None:
    for found in pool.run(_out_of_order):
        assert found == [6, 12, 2 * (1 + 4 + 9)]


def test_positions_that_differ(pool: Pool) -> None:
    """Clean rows are not gathered then, and each layer's direction is reduced."""
    steps = _batches("wide", SIZES["uneven"], 2)
    for step in steps:
        (x, y), (x_clean, y_clean) = step[2]
        step[2] = (x.repeat(1, 2, 1), y), (x_clean.repeat(1, 2, 1), y_clean)
    for told in _assert_merged(pool, "wide", steps):
        assert not any(gathered for gathered, _ in told[1].messages)


def test_a_rank_without_clean_examples(pool: Pool) -> None:
    steps = _batches("mlp", [(4, 2), (5, 0)], 3)
    found = pool.run(_steps, "mlp", steps, {}, ranks=2)
    _assert_exact(found, "mlp", steps)
    assert not any(_merged(found))


def _of_other_layers(group: dist.ProcessGroup, steps: Sequence[Any]) -> tuple[list[_Told], int]:
    """Steps in which the last rank leaves out a layer, and how often the ranks met for those."""
    rank = _Rank(group, "optional")
    rank.model.both = dist.get_rank(group) < 2
    meet = Processes.meet
    with mock.patch.object(Processes, "meet", autospec=True, side_effect=meet) as watched:
        told = [rank.backward(*own[dist.get_rank(group)]) for own in steps]
    return told, sum(call.args[1] == "a merged step" for call in watched.mock_calls)


def test_plans_that_differ(pool: Pool) -> None:
    """The ranks go another way, and after a while they do not try any more."""
    steps = _batches("optional", SIZES["uneven"], 8)
    found = pool.run(_of_other_layers, steps)
    assert not any(_merged([told for told, _ in found]))
    assert [met for _, met in found] == [5] * 3


def _under_autocast(group: dist.ProcessGroup | None, model: str, steps: Sequence[Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return _in_float32(group, model, steps)


def _in_float32(group: dist.ProcessGroup | None, model: str, steps: Sequence[Any]) -> Any:
    rank = _Rank(group, model)
    rank.model.float()
    if group is None:
        return rank.reweighter.backward(*union(steps[-1]))
    return [rank.backward(*own[dist.get_rank(group)]) for own in steps]


@pytest.mark.parametrize("model", ["wide", "convolutions", "tokens"])
def test_autocast(pool: Pool, model: str) -> None:
    steps = _batches(model, SIZES["uneven"], 2)
    if model != "tokens":
        steps = [[tuple((x.float(), y) for x, y in own) for own in step] for step in steps]
    found = pool.run(_under_autocast, model, steps)
    assert _merged(found) == [False, True]
    expected = _under_autocast(None, model, steps)
    for told, weights in zip(found, expected.weights.split([5, 2, 7]), strict=True):
        assert relative_error(told[1].step.weights, weights) <= 1e-2


def _one_under_autocast(group: dist.ProcessGroup, steps: Sequence[Any]) -> list[_Told]:
    with torch.autocast("cpu", torch.bfloat16, enabled=dist.get_rank(group) == 1):
        return _in_float32(group, "wide", steps)


def test_autocast_on_one_rank(pool: Pool) -> None:
    """The ranks would send other dtypes."""
    steps = [
        [tuple((x.float(), y) for x, y in own) for own in step]
        for step in _batches("wide", SIZES["uneven"], 3)
    ]
    assert not any(_merged(pool.run(_one_under_autocast, steps)))


def test_proofs_are_repeated(pool: Pool) -> None:
    """Each rank compares its own batches with plain autograd, and the step is merged."""
    steps = _batches("mlp", SIZES["uneven"], 20)
    for told in _assert_merged(pool, "mlp", steps):
        assert told[-1].explanation is not None
        assert "compared at step 17" in told[-1].explanation.proof


def _scaled(group: dist.ProcessGroup, steps: Sequence[Any], scale: float) -> list[_Told]:
    """Steps under a loss scale, by which the gradients are divided."""
    rank = _Rank(group, "wide")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    told = [rank.backward(*own[dist.get_rank(group)], grad_scaler=scaler) for own in steps]
    for one in told:
        one.gradients = {name: g / scale for name, g in one.gradients.items() if g is not None}
    return told


def test_a_loss_scale(pool: Pool) -> None:
    """Directions carry it."""
    steps = _batches("wide", SIZES["uneven"], 2)
    found = pool.run(_scaled, steps, 8.0)
    assert _merged(found) == [False, True]
    _assert_exact(found, "wide", steps)


def _asked(group: dist.ProcessGroup, steps: Sequence[Any]) -> tuple[Tensor, str]:
    rank = _Rank(group, "wide")
    first, second = (own[dist.get_rank(group)] for own in steps)
    rank.backward(*first)
    weights = rank.reweighter.weights(*second)
    return weights, str(rank.reweighter.explain(*second))


def test_weights_and_explain(pool: Pool) -> None:
    steps = _batches("wide", SIZES["uneven"], 2)
    torch.manual_seed(1)
    expected = truth_of_ranks(
        OWN["wide"][0]().double(), cross_entropy, *zip(*steps[1], strict=True)
    )
    for (weights, text), t in zip(pool.run(_asked, steps), expected, strict=True):
        assert relative_error(weights, t.weights) <= EXACT
        assert "3 ranks exchange the direction" in text


class _Stop(BaseException):
    """Stands for an interrupt from the keyboard."""


def _broken(
    group: dist.ProcessGroup, model: str, steps: Sequence[Any], at: int, kind: type[BaseException]
) -> list[_Told | str]:
    """Steps in whose second one the last rank fails at a report of its backward."""
    rank = _Rank(group, model)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    told: list[_Told | str] = []
    count = itertools.count()
    original = Scoring.report

    def report(self: Scoring, *args: Any) -> None:
        if last and len(told) == 1 and self._exchange is not None and next(count) == at:
            raise kind("in the middle")
        original(self, *args)

    with mock.patch.object(Scoring, "report", report):
        for own in steps:
            try:
                told.append(rank.backward(*own[dist.get_rank(group)]))
            except BaseException as error:
                told.append(type(error).__name__)
    return told


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("model", ["wide", "shared", "tokens"])
@pytest.mark.parametrize("kind", [RuntimeError, NotExactError, torch.OutOfMemoryError])
def test_a_rank_fails_in_its_backward(
    pool: Pool, model: str, kind: type[BaseException], at: int
) -> None:
    """All ranks make this step another way, and the next one is merged again."""
    steps = _batches(model, SIZES["uneven"], 4)
    found = pool.run(_broken, model, steps, at, kind)
    _assert_exact(found, model, steps)
    assert _merged(found) == [False, False, True, True]


def _broken_before_its_backward(
    group: dist.ProcessGroup, model: str, steps: Sequence[Any]
) -> list[_Told]:
    """Steps in whose second one the last rank fails when the plan has been agreed on."""
    rank = _Rank(group, model)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    told: list[_Told] = []
    original = Scoring.follow

    def follow(self: Scoring, plan: Any) -> None:
        if last and len(told) == 1 and self._exchange is not None:
            raise torch.OutOfMemoryError("for the seeds of the backward")
        original(self, plan)

    with mock.patch.object(Scoring, "follow", follow):
        for own in steps:
            told.append(rank.backward(*own[dist.get_rank(group)]))
    return told


def test_a_rank_fails_before_its_backward(pool: Pool) -> None:
    steps = _batches("shared", SIZES["uneven"], 3)
    found = pool.run(_broken_before_its_backward, "shared", steps)
    _assert_exact(found, "shared", steps)
    assert _merged(found) == [False, False, True]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("model", ["wide", "shared", "tokens"])
def test_a_rank_is_interrupted_in_its_backward(pool: Pool, model: str, at: int) -> None:
    """What is no error ends the step on all ranks."""
    steps = _batches(model, SIZES["uneven"], 3)
    found = pool.run(_broken, model, steps, at, _Stop)
    assert [told.pop(1) for told in found] == ["RankError", "RankError", "_Stop"]
    _assert_exact(found, model, [steps[0], steps[2]])
    assert _merged(found) == [False, True]


def _many_steps(group: dist.ProcessGroup, steps: Sequence[Any]) -> tuple[int, int, Tensor]:
    """Steps of which a third fail, on drawn ranks and in drawn places of the backward."""
    rank, drawn = _Rank(group, "shared"), random.Random(0)  # the same on each rank
    optimizer = torch.optim.SGD(rank.model.parameters(), 0.1)
    bad, at = -1, -1
    original = Scoring.report

    def report(self: Scoring, *args: Any) -> None:
        nonlocal at
        if self._exchange is not None:
            at -= 1
            if at == 0 and dist.get_rank(group) == bad:
                raise kind("in the middle")
        original(self, *args)

    stopped = 0
    with mock.patch.object(Scoring, "report", report):
        for own in steps:
            bad, at = drawn.randrange(9), drawn.randint(1, 4)
            kind = drawn.choice([RuntimeError, torch.OutOfMemoryError, _Stop])
            try:
                rank.backward(*own[dist.get_rank(group)])
                optimizer.step()
            except (RankError, _Stop):
                stopped += 1
    merged = sum(scored is not None for scored in rank.merged)
    return merged, stopped, flat(p.detach() for p in rank.model.parameters())


def test_many_steps_with_errors(pool: Pool) -> None:
    """Nobody hangs, and parameters are the same on all ranks."""
    steps = _batches("shared", SIZES["uneven"], 150)
    (merged, stopped, first), *others = pool.run(_many_steps, steps)
    assert merged > 75
    assert stopped > 5
    for found in others:
        assert found[:2] == (merged, stopped)
        assert torch.equal(found[2], first)
