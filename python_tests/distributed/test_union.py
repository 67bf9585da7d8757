"""A step on several ranks is the oracle's step on the union of their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error, weighted_gradient
from support.models import ENGINES, cross_entropy
from support.oracle import EXACT, truth_of_ranks
from support.processes import SIZE, Pool
from support.ranks import (
    COUPLED,
    MODELS,
    SIZES,
    WRAPPERS,
    Batches,
    Outcome,
    Rank,
    ScaledCrossEntropy,
    Setup,
    assert_steps,
    draw,
    train,
    truths,
)


def _assert_exact(
    pool: Pool, setup: Setup, sizes: Sequence[tuple[int, int]], steps: int = 2
) -> list[list[Outcome]]:
    batches = draw(setup.model, sizes, steps)
    found = pool.run(train, setup, batches, ranks=len(sizes))
    assert_steps(found, truths(setup, batches))
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("ranks", range(1, SIZE + 1))
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(pool: Pool, engine: str, ranks: int, sizes: str, wrapper: str) -> None:
    setup = Setup(options={"engine": engine}, wrapper=WRAPPERS[wrapper])
    found = _assert_exact(pool, setup, SIZES[sizes][:ranks])
    assert {outcome.engine for outcomes in found for outcome in outcomes} == {engine}


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        (model, engine)
        for model in MODELS
        for engine in ("auto", *ENGINES)
        if engine != "layerwise" or model not in COUPLED
    ],
)
def test_models(pool: Pool, model: str, engine: str) -> None:
    wrapper = {"find_unused_parameters": True} if model == "branches" else {}
    _assert_exact(pool, Setup(model, options={"engine": engine}, wrapper=wrapper), SIZES["uneven"])
    _assert_exact(pool, Setup(model, options={"engine": engine}, wrapper=None), SIZES["uneven"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_each_rank_chooses_its_engine(pool: Pool, wrapper: str) -> None:
    setup = Setup("meets if odd", wrapper=WRAPPERS[wrapper])
    found = _assert_exact(pool, setup, [(4, 2), (5, 3), (6, 1)], steps=3)
    engines = [outcome.engine for outcomes in found for outcome in outcomes]
    assert engines == ["layerwise"] * 3 + ["forward"] * 3 + ["layerwise"] * 3


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("loss", [None, ScaledCrossEntropy])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ten_steps_of_an_optimiser(pool: Pool, wrapper: str, loss: Any, low_memory: bool) -> None:
    setup = Setup(
        loss=loss,
        options={"low_memory": low_memory},
        wrapper=WRAPPERS[wrapper],
        optimizer=torch.optim.Adam,
        rate=0.01,
    )
    _assert_exact(pool, setup, SIZES["uneven"], steps=10)


def _one_sided(sizes: Sequence[tuple[int, int]], agreeing: Sequence[int]) -> Batches:
    """Positive inputs of a linear model: of another class than the clean ones, scores are negative.

    On the ranks that agree, all examples are of that class.
    """

    def positive(batch: Any, label: int) -> Any:
        return None if batch is None else (batch[0].abs(), torch.full_like(batch[1], label))

    (batches,) = draw("linear", sizes)
    return [
        [
            (positive(batch, 0 if rank in agreeing else 1), positive(clean, 0))
            for rank, (batch, clean) in enumerate(batches)
        ]
    ]


def _onto_ones(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> list[Outcome]:
    """A step that adds to gradients of one."""
    rank = Rank(group, setup)
    for p in rank.parameters():
        p.grad = torch.ones_like(p)
    outcome = rank.outcome(rank.reweighter.backward(*batches[0][dist.get_rank(group)]))
    for name, g in outcome.gradients.items():
        outcome.gradients[name] = None if g is None else g - 1
    return [outcome]


@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_score_is_positive(pool: Pool, wrapper: str, on_degenerate: str) -> None:
    setup = Setup("linear", options={"on_degenerate": on_degenerate}, wrapper=WRAPPERS[wrapper])
    batches = _one_sided(SIZES["uneven"], agreeing=[])
    ((*expected,),) = truths(setup, batches)
    assert all(bool((t.scores < 0).all()) for t in expected)
    if on_degenerate == "uniform":
        count = sum(t.weights.numel() for t in expected)
        own = Rank(None, setup)
        gradients: dict[str, Tensor | None] = {}
        for (batch, _), t in zip(batches[0], expected, strict=True):
            t.weights += 1 / count
            for name, g in weighted_gradient(own.inner, own.loss, batch, t.weights).items():
                gradients[name] = g if name not in gradients else gradients[name] + g
            t.gradients = gradients
    found = pool.run(_onto_ones, setup, batches)
    for outcomes in found:
        assert outcomes[0].degenerate
    assert_steps(found, [expected], tolerance=1e-11)  # of gradients that one was added to


@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_rank_has_all_positive_scores(pool: Pool, wrapper: str, on_degenerate: str) -> None:
    setup = Setup("linear", options={"on_degenerate": on_degenerate}, wrapper=WRAPPERS[wrapper])
    batches = _one_sided(SIZES["uneven"], agreeing=[1])
    found = pool.run(train, setup, batches)
    assert [bool(outcomes[0].weights.any()) for outcomes in found] == [False, True, False]
    assert_steps(found, truths(setup, batches))


def _in_float32(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.float(), targets)


def _in_16_bits(group: dist.ProcessGroup, batches: Batches) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    model = MODELS["mlp"][0]().bfloat16()
    batch, clean = (
        None if pair is None else (pair[0].bfloat16(), pair[1])
        for pair in batches[0][dist.get_rank(group)]
    )
    step = Reweighter(model, _in_float32, process_group=group).backward(batch, clean)
    return step.clean_loss, step.weights.sum()


def test_losses_of_another_dtype_than_the_parameters(pool: Pool) -> None:
    """A rank without a clean batch does not know the dtype of the clean losses."""
    found = pool.run(_in_16_bits, draw("mlp", SIZES["one rank without clean examples"]))
    assert float(sum(total for _, total in found)) == pytest.approx(1, abs=1e-6)
    first, *others = (float(clean_loss) for clean_loss, _ in found)
    assert first > 0
    assert others == pytest.approx([first] * 2, rel=1e-2)  # in 16 bits


def _of_other_dtypes(group: dist.ProcessGroup, batches: Batches) -> list[Tensor | str]:
    """Steps whose clean losses alone, and whose losses on rank 1, have another dtype."""
    batch, clean = batches[0][dist.get_rank(group)]
    own = _in_float32 if dist.get_rank(group) == 1 else cross_entropy
    found: list[Tensor | str] = []
    first = Rank(group, Setup(options={"clean_loss_fn": cross_entropy}, wrapper=None))
    first.reweighter.loss_fn = _in_float32
    found.append(first.reweighter.backward(batch, clean).clean_loss)
    second = Rank(group, Setup(wrapper=None)).reweighter
    second.loss_fn = own
    try:
        second.backward(batch, clean)
    except TypeError as error:
        found.append(str(error))
    try:
        with second.accumulate():
            second.backward(batch, clean)
    except TypeError as error:
        found.append(str(error))
    return found


def test_losses_of_more_than_one_dtype(pool: Pool) -> None:
    batches = draw("mlp", SIZES["uneven"])
    ((expected, *_),) = truths(Setup(), batches)
    for clean_loss, *errors in pool.run(_of_other_dtypes, batches):
        assert relative_error(clean_loss, expected.clean_loss) <= EXACT
        assert len(errors) == 2
        assert all("same dtype" in error for error in errors)


_NONE = torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("bad", [[0], [1, 2]])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_examples_that_are_not_finite_are_left_out(
    pool: Pool, wrapper: str, bad: list[int]
) -> None:
    """Every rank's count is that of all ranks; one rank may lose all of its examples."""
    setup = Setup("linear", options={"engine": "layerwise"}, wrapper=WRAPPERS[wrapper])
    batches = draw("linear", SIZES["uneven"])
    counts = [1 + rank if rank in bad else 0 for rank in range(SIZE)]
    kept = [((x[k:], y[k:]), c) for k, ((x, y), c) in zip(counts, batches[0], strict=True)]
    others = [pair for pair in kept if len(pair[0][1])]
    own = Rank(None, setup)
    rest = iter(truth_of_ranks(own.inner, own.loss, [b for b, _ in others], [c for _, c in kept]))
    expected = []
    for k, (batch, _) in zip(counts, kept, strict=True):
        t = next(rest) if len(batch[1]) else replace(expected[0], scores=_NONE, weights=_NONE)
        nan = torch.full((k,), float("nan"), dtype=torch.float64)
        expected.append(
            replace(
                t, scores=torch.cat([nan, t.scores]), weights=torch.cat([torch.zeros(k), t.weights])
            )
        )
    for k, ((x, _), _) in zip(counts, batches[0], strict=True):
        x[:k] = float("nan")
    found = pool.run(train, setup, batches)
    assert_steps(found, [expected])
    assert found[0][0].nonfinite == sum(counts)


def _asked(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> tuple[Tensor, str, bool]:
    """What ``weights()`` and ``explain()`` say, and whether they left gradients alone."""
    rank = Rank(group, setup)
    own = batches[0][dist.get_rank(group)]
    weights = rank.reweighter.weights(*own)
    text = str(rank.reweighter.explain(*own))
    return weights, text, all(p.grad is None for p in rank.parameters())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_and_explain(pool: Pool, engine: str, wrapper: str) -> None:
    setup = Setup(options={"engine": engine}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"])
    (expected,) = truths(setup, batches)
    for (weights, text, untouched), t in zip(
        pool.run(_asked, setup, batches), expected, strict=True
    ):
        assert float((weights - t.weights).norm()) <= 1e-12
        assert engine in text
        assert "3 ranks" in text
        assert untouched


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_clean_batch_everywhere(pool: Pool, engine: str, wrapper: str) -> None:
    setup = Setup(options={"engine": engine, "replicated_clean": True}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"], steps=2)
    batches = [[(batch, own[0][1]) for batch, _ in own] for own in batches]
    assert_steps(pool.run(train, setup, batches), truths(setup, batches))


@st.composite
def _drawn(draw_value: st.DrawFn) -> tuple[Setup, list[tuple[int, int]], int]:
    model = draw_value(st.sampled_from([name for name in MODELS if name != "branches"]))
    engines = ["auto", *(e for e in ENGINES if e != "layerwise" or model not in COUPLED)]
    wrapper: Any = draw_value(
        st.sampled_from(
            [
                None,
                {},
                {"static_graph": True},
                {"gradient_as_bucket_view": True},
                {"find_unused_parameters": True},
                {"bucket_cap_mb": 1e-4},
            ]
        )
    )
    options = {
        "engine": draw_value(st.sampled_from(engines)),
        "low_memory": draw_value(st.sampled_from([False, True, "auto"])),
    }
    loss = draw_value(st.sampled_from([None, ScaledCrossEntropy]))
    least = 3 if model in COUPLED else 1  # of two, batch norm leaves signs
    size = st.tuples(st.integers(least, 6), st.sampled_from([0, *range(least, 5)]))
    sizes = draw_value(
        st.lists(size, min_size=1, max_size=SIZE).filter(lambda s: any(m for _, m in s))
    )
    return Setup(model, loss, options, wrapper), sizes, draw_value(st.integers(0, 10**6))


def test_drawn_setups(pool: Pool) -> None:
    @settings(max_examples=40)
    @given(_drawn())
    def check(drawn: tuple[Setup, list[tuple[int, int]], int]) -> None:
        setup, sizes, seed = drawn
        batches = draw(setup.model, sizes, steps=2, seed=seed)
        expected = truths(setup, batches)
        assert_steps(pool.run(train, setup, batches, ranks=len(sizes)), expected)

    check()


def _unlike(
    group: dist.ProcessGroup,
    setup: Setup,
    batches: Batches,
    options: list[dict[str, Any]],
    said: str,
) -> None:
    """A step of which something is not the same on all ranks."""
    rank = dist.get_rank(group)
    own = Rank(group, replace(setup, options={**setup.options, **options[rank]}))
    with torch.no_grad():
        for p in own.inner.get_submodule("2").parameters():
            p.zero_()  # all losses are log C
    with pytest.raises(ValueError, match=said):
        own.reweighter.backward(*batches[0][rank])
    assert all(p.grad is None for p in own.parameters())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clean_batches_that_are_not_the_same_although_their_losses_are(
    pool: Pool, wrapper: str
) -> None:
    setup = Setup(options={"replicated_clean": True}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["even"])
    pool.run(_unlike, setup, batches, [{}] * SIZE, "clean batches of the ranks are not the same")


def test_other_options_on_one_rank(pool: Pool) -> None:
    options = [{}, {"on_degenerate": "skip"}, {}]
    pool.run(_unlike, Setup(), draw("mlp", SIZES["even"]), options, "other options")


def _unlike_scales(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> None:
    rank = dist.get_rank(group)
    own = Rank(group, setup)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + rank))
    with pytest.raises(ValueError, match=r"scales of the ranks are \[8.0, 16.0, 32.0\]"):
        own.reweighter.backward(*batches[0][rank], grad_scaler=scaler)


def test_other_loss_scales_on_each_rank(pool: Pool) -> None:
    pool.run(_unlike_scales, Setup(), draw("mlp", SIZES["even"]))
