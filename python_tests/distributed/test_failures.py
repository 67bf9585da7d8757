"""What fails on one rank fails on all within the step, changes nothing, and the next step works.

Nobody waits for a rank that has failed: a call that hangs fails with the pool's timeout.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2rw_ext import NotExactError, RankError, reference
from support.models import ENGINES, cross_entropy, vectors
from support.oracle import unchanged
from support.processes import Pool
from support.ranks import SIZES, Batches, Outcome, Rank, Setup, assert_step, draw, truths

WRAPPERS: dict[str, dict[str, Any] | None] = {
    "wrapped": {},
    "static graph": {"static_graph": True},
    "group given": None,
}


class _FaultError(Exception):
    """Raised by a model, a loss or a hook."""


def _raise(*_: Any) -> Any:
    raise _FaultError("of this rank")


def _forward_fails(own: Rank, batch: Any, clean: Any) -> None:
    handle = own.inner[1].register_forward_hook(_raise)
    try:
        own.reweighter.backward(batch, clean)
    finally:
        handle.remove()


def _backward_fails(own: Rank, batch: Any, clean: Any) -> None:
    def forward_hook(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(_raise)

    handle = own.inner[1].register_forward_hook(forward_hook)
    try:
        own.reweighter.backward(batch, clean)
    finally:
        handle.remove()


def _loss_fails(own: Rank, batch: Any, clean: Any) -> None:
    own.loss.fault = _raise
    try:
        own.reweighter.backward(batch, clean)
    finally:
        own.loss.fault = None


def _loss_is_one_number(own: Rank, batch: Any, clean: Any) -> None:
    own.loss.fault = Tensor.mean
    try:
        own.reweighter.backward(batch, clean)
    finally:
        own.loss.fault = None


def _not_exact(own: Rank, batch: Any, clean: Any) -> None:
    """Examples meet, on this rank alone."""
    handle = own.inner[1].register_forward_hook(lambda _, __, output: output - output.mean(0))
    try:
        own.reweighter.backward(batch, clean)
    finally:
        handle.remove()


def _clean_loss_is_nan(own: Rank, batch: Any, clean: Any) -> None:
    x, y = clean
    own.reweighter.backward(batch, (x * float("nan"), y))


def _training_loss_is_nan(own: Rank, batch: Any, clean: Any) -> None:
    x, y = batch
    own.reweighter.backward((x * float("nan"), y), clean)


def _wrong_argument(own: Rank, batch: Any, clean: Any) -> None:
    own.reweighter.backward(batch, clean, batch_size="many")


def _wrong_batch(own: Rank, batch: Any, clean: Any) -> None:
    own.reweighter.backward(batch[0], clean)


def _wrong_index(own: Rank, batch: Any, clean: Any) -> None:
    own.reweighter.backward(batch, clean, index=[-1])


def _wrong_shape(own: Rank, batch: Any, clean: Any) -> None:
    x, y = batch
    own.reweighter.backward((x[:, 1:], y), clean)


def _wrong_clean_shape(own: Rank, batch: Any, clean: Any) -> None:
    x, y = clean
    own.reweighter.backward(batch, (x[:, 1:], y))


def _without_grad(own: Rank, batch: Any, clean: Any) -> None:
    with torch.no_grad():
        own.reweighter.backward(batch, clean)


Kind = tuple[Callable[[Rank, Any, Any], None], type[BaseException], str]

FAULTS: dict[str, Kind] = {
    "argument": (_wrong_argument, ValueError, "batch_size"),
    "batch": (_wrong_batch, Exception, "training batch"),
    "index": (_wrong_index, ValueError, "index"),
    "no grad": (_without_grad, RuntimeError, "no_grad"),
    "shape": (_wrong_shape, RuntimeError, "shapes"),
    "clean shape": (_wrong_clean_shape, RuntimeError, "shapes"),
    "hook of the forward": (_forward_fails, _FaultError, "of this rank"),
    "hook of the backward": (_backward_fails, _FaultError, "of this rank"),
    "loss": (_loss_fails, _FaultError, "of this rank"),
    "loss of one number": (_loss_is_one_number, ValueError, "loss"),
    "clean loss": (_clean_loss_is_nan, ValueError, "is nan"),
}
"""What a rank does, what it raises, and a part of the message; the same in each engine."""


class _Loss(nn.Module):
    """Cross entropy, unless it is told otherwise."""

    fault: Callable[[Tensor], Tensor] | None = None

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(outputs, targets)
        return losses if self.fault is None else self.fault(losses)


def _fails(own: Rank, kind: Kind | None, call: Callable[[], Any]) -> str:
    """The message of what a call raises: on a rank with a fault its own, else that of another."""
    error, message = (RankError, "rank") if kind is None else kind[1:]
    with unchanged(own.model), pytest.raises(error, match=message) as caught:
        call()
    return str(caught.value)


def _call(own: Rank, kind: Kind | None, pair: Any) -> Callable[[], Any]:
    """A step on these batches, as a rank with the fault makes it, or any other."""
    return lambda: own.reweighter.backward(*pair) if kind is None else kind[0](own, *pair)


def _faults(
    group: dist.ProcessGroup,
    setup: Setup,
    batches: Batches,
    kinds: Sequence[Kind],
    bad: int,
    before: int,
) -> list[tuple[str, Outcome]]:
    """After some good steps: what each of steps with a fault says, and the good step after it."""
    own, rank, found = Rank(group, setup), dist.get_rank(group), []
    pair = batches[0][rank]
    for _ in range(before):
        own.reweighter.backward(*pair)
    for kind in kinds:
        own.optimizer.zero_grad()
        mine = kind if rank == bad else None
        message = _fails(own, mine, _call(own, mine, pair))
        found.append((message, own.outcome(own.reweighter.backward(*pair))))
    return found


def _assert_faults(
    pool: Pool,
    setup: Setup,
    kinds: Sequence[Kind],
    *,
    bad: int = 1,
    before: int = 0,
    ranks: int = 3,
) -> None:
    batches = draw(setup.model, SIZES["uneven"][:ranks])
    if "replicated_clean" in setup.options:
        batches = [[(batch, batches[0][0][1]) for batch, _ in batches[0]]]
    (expected,) = truths(setup, batches)
    found = pool.run(_faults, setup, batches, kinds, bad, before, ranks=ranks)
    for by_rank in zip(*found, strict=True):
        for rank, (message, _) in enumerate(by_rank):
            assert rank == bad or f"rank {bad}" in message, message
        assert_step([outcome for _, outcome in by_rank], expected)


@pytest.mark.parametrize("wrapper", ["wrapped", "group given"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_fails_in_the_first_step(
    pool: Pool, engine: str, fault: str, wrapper: str
) -> None:
    setup = Setup(loss=_Loss, options={"engine": engine}, wrapper=WRAPPERS[wrapper])
    _assert_faults(pool, setup, [FAULTS[fault]])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_one_rank_fails_in_later_steps(pool: Pool, engine: str, wrapper: str) -> None:
    setup = Setup(loss=_Loss, options={"engine": engine}, wrapper=WRAPPERS[wrapper])
    _assert_faults(pool, setup, list(FAULTS.values()), before=2)


@pytest.mark.parametrize("bad", [0, 1])
def test_of_two_ranks_either_may_fail(pool: Pool, bad: int) -> None:
    _assert_faults(pool, Setup(loss=_Loss), list(FAULTS.values()), bad=bad, ranks=2)


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "eager"},
        {"replicated_clean": True},
        {"on_degenerate": "skip"},
        {"weighing": reference.weights_from_scores},
        {"low_memory": True},
        {"low_memory": False},
    ],
    ids=lambda options: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()),
)
@pytest.mark.parametrize("before", [0, 3])
def test_one_rank_fails_with_options(pool: Pool, options: dict[str, Any], before: int) -> None:
    setup = Setup(loss=_Loss, options=options)
    _assert_faults(pool, setup, list(FAULTS.values()), before=before)


@pytest.mark.parametrize("compile", [False, "eager"])
def test_one_rank_fails_along_a_held_direction(pool: Pool, compile: Any) -> None:
    """The clean batch is used by one step in a hundred, which is the first."""
    setup = Setup(loss=_Loss, options={"every": 100, "compile": compile})
    kinds = [kind for name, kind in FAULTS.items() if not name.startswith("clean")]
    _assert_faults(pool, setup, kinds)
    _assert_faults(pool, setup, kinds, before=3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_forced_engine_is_not_exact_on_one_rank(pool: Pool, warm: bool, wrapper: str) -> None:
    setup = Setup(loss=_Loss, options={"engine": "layerwise"}, wrapper=WRAPPERS[wrapper])
    kind = (_not_exact, NotExactError, "mixes examples")
    _assert_faults(pool, setup, [kind], bad=2, before=2 if warm else 0)


@pytest.mark.parametrize("engine", ["forward", "double_backward"])
def test_an_example_that_an_engine_cannot_leave_out(pool: Pool, engine: str) -> None:
    setup = Setup(loss=_Loss, options={"engine": engine})
    kind = (_training_loss_is_nan, ValueError, "training batch")
    _assert_faults(pool, setup, [kind], bad=0)


def _all_differ(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> tuple[str, Outcome]:
    """Each rank fails, in another way."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    kind = FAULTS[["argument", "batch", "no grad"][rank]]
    message = _fails(own, kind, _call(own, kind, batches[0][rank]))
    return message, own.train(*batches[0][rank])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_all_ranks_fail_in_other_ways(pool: Pool, wrapper: str) -> None:
    setup = Setup(loss=_Loss, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"])
    (expected,) = truths(setup, batches)
    found = pool.run(_all_differ, setup, batches)
    assert_step([outcome for _, outcome in found], expected)


def _nobody_has_clean_examples(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> str:
    own, rank = Rank(group, setup), dist.get_rank(group)
    batch, clean = batches[0][rank]
    with unchanged(own.model), pytest.raises((ValueError, TypeError)) as caught:
        own.reweighter.backward(batch)
    own.train(batch, clean)
    return str(caught.value)


def test_no_rank_has_clean_examples(pool: Pool) -> None:
    for message in pool.run(_nobody_has_clean_examples, Setup(), draw("mlp", SIZES["even"])):
        assert "clean" in message


def _after_a_caught_error(
    group: dist.ProcessGroup, setup: Setup, parts: Batches, bad: int
) -> tuple[str, Any]:
    """The user's own code catches an error of all ranks, and raises another one on one rank."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    mine: Any = (None, TypeError, "of this rank") if rank == bad else None

    def accumulate() -> None:
        with own.reweighter.accumulate():
            own.reweighter.backward(*parts[0][rank])
            with contextlib.suppress(TypeError):
                own.reweighter.weights(None)
            if rank == bad:  # in the memory of the error before, perhaps
                raise TypeError("of this rank")

    return _fails(own, mine, accumulate), own.train(*parts[0][rank])


def test_another_error_after_one_that_was_caught(pool: Pool) -> None:
    setup = Setup(loss=_Loss, wrapper=None)
    parts = draw("mlp", SIZES["uneven"])
    (expected,) = truths(setup, parts)
    found = pool.run(_after_a_caught_error, setup, parts, 1, seconds=20)
    for rank, (message, _) in enumerate(found):
        assert rank == 1 or "rank 1" in message, message
    assert_step([outcome for _, outcome in found], expected)


def _in_accumulate(
    group: dist.ProcessGroup, setup: Setup, parts: Batches, kind: Kind, bad: int, at: int
) -> tuple[str, Any]:
    """A fault in one micro-batch, at the place where the context ends at the latest.

    What finished micro-batches did to buffers remains, as in one process.
    """
    own, rank = Rank(group, setup), dist.get_rank(group)
    mine = kind if rank == bad else None
    error, message = (RankError, "rank") if mine is None else mine[1:]

    def accumulate() -> None:
        with own.reweighter.accumulate():
            for k, batches in enumerate(parts):
                batch, clean = batches[rank]
                fault = mine if k == at else None
                _call(own, fault, (batch, clean if k == 0 or fault else None))()

    with pytest.raises(error, match=message) as caught:
        accumulate()
    assert all(p.grad is None for p in own.parameters())
    return str(caught.value), own.train(*parts[0][rank])


@pytest.mark.parametrize("model", ["mlp", "batch norm"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("fault", ["argument", "shape", "loss", "hook of the backward"])
def test_one_rank_fails_in_accumulate(
    pool: Pool, fault: str, at: int, wrapper: str, model: str
) -> None:
    setup = Setup(model, loss=_Loss, wrapper=WRAPPERS[wrapper])
    parts = draw(model, SIZES["uneven"], steps=3)
    (expected,) = truths(setup, parts[:1])
    found = pool.run(_in_accumulate, setup, parts, FAULTS[fault], 1, at, seconds=20)
    for rank, (message, _) in enumerate(found):
        assert rank == 1 or "rank 1" in message, message
    assert_step([outcome for _, outcome in found], expected)


def _between_micro_batches(
    group: dist.ProcessGroup, setup: Setup, parts: Batches, bad: int
) -> tuple[str, Any]:
    """The user's own code raises between two micro-batches."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    mine: Any = (None, _FaultError, "of this rank") if rank == bad else None

    def accumulate() -> None:
        with own.reweighter.accumulate():
            for k, batches in enumerate(parts):
                if rank == bad and k == 1:
                    _raise()
                batch, clean = batches[rank]
                own.reweighter.backward(batch, clean if k == 0 else None)

    return _fails(own, mine, accumulate), own.train(*parts[0][rank])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_loop_fails_between_micro_batches(pool: Pool, wrapper: str) -> None:
    setup = Setup(loss=_Loss, wrapper=WRAPPERS[wrapper])
    parts = draw("mlp", SIZES["uneven"], steps=2)
    (expected,) = truths(setup, parts[:1])
    found = pool.run(_between_micro_batches, setup, parts, 1)
    for rank, (message, _) in enumerate(found):
        assert rank == 1 or "rank 1" in message, message
    assert_step([outcome for _, outcome in found], expected)


def _asked(
    group: dist.ProcessGroup, setup: Setup, batches: Batches, kind: Kind, call: str
) -> tuple[str, Outcome]:
    """A fault in ``weights()`` or ``explain()`` of rank 1."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    mine = kind if rank == 1 else None
    asked = getattr(own.reweighter, call)
    if mine is None:
        message = _fails(own, None, lambda: asked(*batches[0][rank]))
    else:
        own.reweighter.backward = asked  # what the fault calls
        message = _fails(own, mine, _call(own, mine, batches[0][rank]))
        del own.reweighter.backward
    return message, own.train(*batches[0][rank])


@pytest.mark.parametrize("call", ["weights", "explain"])
@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("index", "clean loss")])
def test_one_rank_fails_when_asked(pool: Pool, fault: str, call: str) -> None:
    setup = Setup(loss=_Loss)
    batches = draw("mlp", SIZES["uneven"])
    (expected,) = truths(setup, batches)
    found = pool.run(_asked, setup, batches, FAULTS[fault], call)
    for rank, (message, _) in enumerate(found):
        assert rank == 1 or "rank 1" in message, message
    assert_step([outcome for _, outcome in found], expected)


def _disagree(group: dist.ProcessGroup, setup: Setup, batches: Batches, how: str) -> list[Any]:
    """What the ranks say if the first one does something else, and the next step."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    pair = batches[0][rank]
    call, arguments = own.reweighter.backward, {}
    if how == "method" and rank == 0:
        call = own.reweighter.weights
    if how == "index" and rank == 0:
        arguments["index"] = torch.arange(len(pair[0][1]))
    if how == "interrupt" and rank == 0:
        own.loss.fault = _interrupt
    with unchanged(own.model), pytest.raises((RankError, ValueError, KeyboardInterrupt)) as caught:
        call(*pair, **arguments)
    own.loss.fault = None
    return [type(caught.value).__name__, str(caught.value), own.train(*pair)]


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("how", "kinds", "message"),
    [
        ("method", ["RankError"] * 3, "rank 0 at 'weights()', rank 1 at 'backward()'"),
        ("index", ["ValueError"] * 3, "on all ranks or on none"),
        ("interrupt", ["KeyboardInterrupt", "RankError", "RankError"], "rank 0 failed"),
    ],
)
def test_ranks_that_do_not_do_the_same(
    pool: Pool, how: str, kinds: list[str], message: str, wrapper: str
) -> None:
    setup = Setup(loss=_Loss, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"])
    (expected,) = truths(setup, batches)
    found = pool.run(_disagree, setup, batches, how)
    assert [kind for kind, *_ in found] == kinds
    assert all(message in said for kind, said, _ in found if kind != "KeyboardInterrupt")
    assert_step([outcome for *_, outcome in found], expected)


def _many_steps(group: dist.ProcessGroup, setup: Setup, steps: int) -> tuple[int, Tensor]:
    """Steps on drawn batches, of which every fifth fails; how many did, and the parameters."""
    own, rank = Rank(group, setup), dist.get_rank(group)
    drawn = random.Random(0)  # the same on each rank
    torch.manual_seed(rank)
    failed = 0
    for _ in range(steps):
        least = 3 if setup.model == "batch norm" else 1
        batch, clean = vectors(drawn.randint(least, 6) + rank), vectors(least + rank)
        own.optimizer.zero_grad()
        bad = drawn.sample(range(3), drawn.randint(1, 2)) if drawn.random() < 0.2 else []
        faults = {r: FAULTS[drawn.choice(list(FAULTS))] for r in bad}
        if not faults:
            own.reweighter.backward(batch, clean)
            own.optimizer.step()
            continue
        mine = faults.get(rank)
        # If two ranks fail, the one that would have done so later learns of the other.
        with pytest.raises(RankError if mine is None else (mine[1], RankError)):
            _call(own, mine, (batch, clean))()
        assert all(p.grad is None for p in own.parameters())
        failed += 1
    return failed, torch.cat([p.detach().flatten() for p in own.parameters()])


SOAK = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("wrapper", "model", "steps"),
    [
        ("wrapped", "mlp", 600),
        ("wrapped", "batch norm", 100),
        ("group given", "mlp", 100),
        ("static graph", "mlp", 100),
        *(
            pytest.param(wrapper, model, 10_000, marks=SOAK)
            for wrapper in WRAPPERS
            for model in ("mlp", "batch norm")
        ),
    ],
)
def test_many_steps_with_errors(pool: Pool, wrapper: str, model: str, steps: int) -> None:
    """Nobody hangs, and no rank drifts from the others: parameters are the same to the bit."""
    setup = Setup(model, loss=_Loss, wrapper=WRAPPERS[wrapper], rate=0.01)
    found = pool.run(_many_steps, setup, steps, seconds=60 + steps / 10)
    assert {failed for failed, _ in found} == {found[0][0]}
    assert steps / 10 < found[0][0] < steps / 3
    for _, parameters in found:
        assert bool(parameters.isfinite().all())
        assert torch.equal(parameters, found[0][1])
