"""What a step relies on from the first one still holds at that step, or is learnt again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.data.batch import merge
from l2rw_ext.engines.layerwise import engine as layerwise
from l2rw_ext.engines.layerwise.probe import Probe, seeds
from l2rw_ext.layers import costs
from l2rw_ext.reference import relative_error
from support.models import CLASSES, cross_entropy, mlp, model_of, token_loss, vectors
from support.oracle import assert_exact, truth, unchanged

TWO_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a": lambda: nn.Linear(5, 8),
    "b": lambda: nn.Linear(8, CLASSES),
}


def _model(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return model_of(forward, **{name: make() for name, make in TWO_LAYERS.items()})


def _steps(model: nn.Module, *batches: Any, engines: list[str] | None = None) -> Reweighter:
    """Consecutive steps of one Reweighter, each held to the oracle."""
    reweighter = Reweighter(model, cross_entropy)
    for i, (batch, clean) in enumerate(batches):
        step = assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
        if engines is not None:
            assert step.engine == engines[i]
    return reweighter


def _sorted(x: Tensor) -> Tensor:
    return x[x[:, 0].argsort()]


REORDERING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index by a tensor": lambda s, x: s.b(torch.tanh(s.a(x[(o := x[:, 0].argsort())])))[
        o.argsort()
    ],
    "index_select": lambda s, x: s.b(
        torch.tanh(s.a(x.index_select(0, (o := x[:, 0].argsort()))))
    ).index_select(0, o.argsort()),
    "gather": lambda s, x: s.b(
        torch.tanh(s.a(x.gather(0, (o := x[:, 0].argsort())[:, None].expand_as(x))))
    )[o.argsort()],
    "sort of a list": lambda s, x: s.b(
        torch.tanh(s.a(x[(o := sorted(range(len(x)), key=x[:, 0].tolist().__getitem__))]))
    )[torch.tensor(o).argsort()],
    "branch on a value": lambda s, x: (
        s.b(torch.tanh(s.a(x)))
        if bool((x[:, 0].diff() >= 0).all())
        else s.b(torch.tanh(s.a(x.flip(0)))).flip(0)
    ),
}


@pytest.mark.parametrize("name", REORDERING)
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_rows_that_happened_to_be_in_order_at_the_first_step(name: str) -> None:
    model = _model(REORDERING[name])
    x, y = vectors(6)
    clean_x, clean_y = vectors(4)
    in_order = (_sorted(x), y), (_sorted(clean_x) + 100, clean_y)
    out_of_order = (x.flip(0), y), (clean_x, clean_y)
    engines = ["layerwise", "layerwise", "forward", "forward"]
    _steps(model, in_order, in_order, out_of_order, in_order, engines=engines)


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_two_neighbours_out_of_order() -> None:
    model = _model(REORDERING["index by a tensor"])
    x, y = vectors(50)
    x = _sorted(x)
    swapped = x.clone()
    swapped[[30, 31]] = x[[31, 30]]
    clean = vectors(4)
    clean[0][:] = _sorted(clean[0])
    _steps(model, ((x, y), clean), ((swapped, y), clean))


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "largest": lambda x: x / x.abs().amax(),
    "last row": lambda x: x - x[-1],
    "first row": lambda x: x - x[0],
    "rank": lambda x: x.argsort(0).argsort(0).to(x.dtype) / 10,
    "size of the batch": lambda x: x / len(x),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("first", ["other", "same", "reversed", "zeros", "part"])
def test_statistics_of_the_inputs(name: str, first: str) -> None:
    """No gradient shows the dependence; two passes are exact, whatever the first batches were."""
    model = _model(lambda s, x: s.b(torch.tanh(s.a(STATISTICS[name](x)))))
    x, y = vectors(6)
    clean_x = {
        "other": torch.randn(6, 5, dtype=torch.float64),
        "same": x.clone(),
        "reversed": x.flip(0),
        "zeros": torch.zeros(6, 5, dtype=torch.float64),
        "part": x[:4].clone(),
    }[first]
    if first == "zeros":
        x = torch.zeros_like(x) if name != "largest" else x
        clean_x = clean_x if name != "largest" else clean_x + 1
    clean_y = y[: len(clean_x)]
    later = [(vectors(6), vectors(len(clean_x))) for _ in range(2)]
    _steps(model, ((x, y), (clean_x, clean_y)), *later, engines=["layerwise"] * 3)


@pytest.mark.parametrize("name", ["mean", "largest", "size of the batch"])
def test_detached_statistics_of_a_hidden_layer(name: str) -> None:
    model = _model(lambda s, x: s.b(_with_detached(torch.tanh(s.a(x)), name)))
    reweighter = _steps(model, *[(vectors(6), vectors(4)) for _ in range(3)])
    assert "two passes" in reweighter.explain(vectors(6), vectors(4)).passes


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}])
def test_states_picked_by_their_time_are_no_examples(options: dict[str, Any]) -> None:
    """A recurrent layer writes states and gates to parts of one tensor; the batches merge."""
    model = model_of(
        lambda s, x: s.head(s.layer(x)[0][:, -1]),
        layer=nn.LSTM(5, 6, batch_first=True, **options),
        head=nn.LazyLinear(CLASSES),
    ).float()
    batch, clean = ((torch.randn(n, 4, 5), torch.randint(CLASSES, (n,))) for n in (6, 3))
    model(batch[0])
    assert "one merged" in Reweighter(model, cross_entropy).explain(batch, clean).passes


@pytest.mark.parametrize("name", ["mean", "last row", "size of the batch"])
@pytest.mark.parametrize("gate", ["last layer", "scalar"])
def test_statistics_behind_parameters_that_start_at_zero(name: str, gate: str) -> None:
    """The losses do not depend on what a zero multiplies; its gradient does."""

    def forward(model: Any, x: Tensor) -> Tensor:
        seen = torch.tanh(model.a(STATISTICS[name](x)))
        if gate == "last layer":
            return model.b(seen)
        return model.b(torch.tanh(model.a(x))) + model.gate * seen[:, :CLASSES]

    parts: dict[str, Any] = {key: make() for key, make in TWO_LAYERS.items()}
    nn.init.zeros_(parts["a"].bias)
    if gate == "last layer":
        nn.init.zeros_(parts["b"].weight)
    else:
        parts["gate"] = torch.zeros(())
    model = model_of(forward, **parts)
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(3):
        assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise"
        )
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.5 * p.grad


@pytest.mark.parametrize("where", ["dropout", "attention"])
def test_dependence_on_the_size_of_the_batch_behind_dropout(where: str) -> None:
    inner: nn.Module = (
        nn.Dropout(0.5)
        if where == "dropout"
        else nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
    )

    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.inner(torch.tanh(model.a(x)).unsqueeze(1)).squeeze(1)
        return model.b(h) / (len(x) if model.divides else 1)

    parts = {name: make() for name, make in TWO_LAYERS.items()}
    model = model_of(forward, inner=inner, **parts)
    for divides, passes in ((True, "depends on the size"), (False, "one merged")):
        model.divides = divides
        assert passes in Reweighter(model, cross_entropy).explain(vectors(6), vectors(4)).passes


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_mixing_of_examples_that_comes_and_goes() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = torch.tanh(model.a(x))
        if model.mixes:
            h = 0.5 * h + 0.5 * h.roll(1, 0)
        return model.b(h)

    model = _model(forward)
    reweighter = Reweighter(model, cross_entropy)
    for mixes in (False, True):
        model.mixes = mixes
        step = assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
        assert step.engine == ("forward" if mixes else "layerwise")


def test_inputs_that_are_the_same_in_both_batches_are_not_merged() -> None:
    nodes = torch.randn(10, 5)
    assert merge(nodes, nodes.clone(), 6, 4) is None
    assert merge((nodes, 3), (nodes.clone(), 3), 6, 4) is None
    joined = merge((nodes[:6], 3), (nodes[6:], 3), 6, 4)
    assert joined is not None
    assert torch.equal(joined[0], nodes)


def _with_detached(h: Tensor, name: str) -> Tensor:
    return h + (STATISTICS[name](h) - h).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_seen_in_narrow_dtypes(dtype: torch.dtype) -> None:
    model = _model(lambda s, x: s.b(torch.tanh(s.a(x - x.mean(0))))).to(dtype)
    x, y = vectors(60, dtype=dtype)
    batch, clean = (x + 1, y), vectors(30, dtype=dtype)
    passes = Reweighter(model, cross_entropy).explain(batch, clean).passes
    assert "an example's output depends on the rest of its batch: mean (test_plan.py:" in passes


def test_gradients_that_are_zero_at_the_first_step() -> None:
    """A last layer that starts at zero passes nothing back, and shows no row map."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    reweighter = Reweighter(model, cross_entropy)
    batches = vectors(6), vectors(4)
    for _ in range(3):
        assert_exact(model, cross_entropy, *batches, reweighter=reweighter, engine="layerwise")
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.any()


def test_dead_units_that_come_to_life() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    reweighter = Reweighter(model, cross_entropy)
    for bias in (-100.0, -100.0, 0.0, -100.0, 0.0):
        with torch.no_grad():
            model[0].bias.fill_(bias)
        assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise"
        )


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_first_batch_without_a_finite_loss_proves_nothing() -> None:
    """The next step is compared with plain autograd instead."""
    model = mlp()
    reweighter = Reweighter(model, lambda out, t: cross_entropy(out, t[0]) * t[1])
    x, y = vectors(6)
    nan, one = torch.full((6,), float("nan")).double(), torch.ones(6).double()
    step = reweighter.backward((x, (y, nan)), (x[:4] + 1, (y[:4], one[:4])))
    assert step.nonfinite == 6
    assert "not compared" in reweighter.explain((x, (y, nan)), (x[:4] + 1, (y[:4], one[:4]))).proof
    expected = truth(model, reweighter.loss_fn, (x, (y, one)), (x[:4] + 1, (y[:4], one[:4])))
    model.zero_grad()
    step = reweighter.backward((x, (y, one)), (x[:4] + 1, (y[:4], one[:4])))
    assert torch.allclose(step.scores, expected.scores, rtol=1e-10)
    assert "agrees" in reweighter.explain((x, (y, one)), (x[:4] + 1, (y[:4], one[:4]))).proof


def test_control_flow_that_depends_on_data() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.a(x)
        if h.abs().max() > 10:
            h = torch.tanh(h)
        for _ in range(int(x[0, 0] > 0)):
            h = h + model.c(h)
        return model.b(h)

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES), c=nn.Linear(8, 8))
    batches = []
    for scale in (1.0, 100.0, -1.0, -100.0, 1.0):
        (x, y), (clean_x, clean_y) = vectors(6), vectors(4)
        x[0, 0] = scale
        batches.append(((x * abs(scale), y), (clean_x, clean_y)))
    _steps(model, *batches, engines=["layerwise"] * 5)


def test_branch_by_an_attribute_of_the_model() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = torch.tanh(model.a(x))
        return model.b(h) if not model.twice else model.b(torch.tanh(h + model.c(h)))

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES), c=nn.Linear(8, 8))
    reweighter = Reweighter(model, cross_entropy)
    for twice in (False, True, False):
        model.twice = twice
        assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise"
        )


def test_derived_weights_that_change_places() -> None:
    """A shape does not tell two derived weights apart, nor what else their parameters do."""

    def forward(model: Any, x: Tensor) -> Tensor:
        derived = (model.a if model.first else model.c).weight.t()
        return model.b(torch.tanh(model.c(torch.tanh(model.a(x)))) @ derived)

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES), c=nn.Linear(5, 5))
    reweighter = Reweighter(model, cross_entropy)
    for first in (True, False, True):
        model.first = first
        assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise"
        )


def test_batches_that_share_examples_are_merged() -> None:
    model = mlp()
    x, y = vectors(6)
    reweighter = _steps(model, ((x, y), (x[:2], y[:2])), ((x, y), vectors(2)))
    assert "one merged" in reweighter.explain((x, y), (x[:2], y[:2])).passes


def test_shapes_that_change() -> None:
    model = model_of(
        lambda s, x: s.b(torch.tanh(s.a(x)).mean(1)), **{k: f() for k, f in TWO_LAYERS.items()}
    )

    def batch(k: int, length: int) -> Any:
        return torch.randn(k, length, 5, dtype=torch.float64), torch.randint(CLASSES, (k,))

    sizes = [
        ((6, 3), (4, 3)),
        ((6, 3), (4, 2)),
        ((5, 2), (4, 2)),
        ((1, 1), (1, 1)),
        ((6, 3), (4, 3)),
    ]
    _steps(model, *[(batch(*a), batch(*b)) for a, b in sizes], engines=["layerwise"] * 5)


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_train_and_eval_mode_in_turn() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy)
    for training in (True, False, True, False):
        model.train(training)
        step = assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, tolerance=1e-11
        )
        assert step.engine == ("forward" if training else "layerwise")


def test_parameters_that_are_frozen_loaded_and_replaced() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy)

    def step() -> None:
        assert_exact(
            model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise"
        )

    step()
    model[0].requires_grad_(False)
    step()
    model[0].requires_grad_(True)
    model[2].bias.requires_grad_(False)
    step()
    model.load_state_dict(mlp().state_dict())
    step()
    model[0] = nn.Linear(5, 8).double()
    step()
    model[2].weight = nn.Parameter(torch.randn(CLASSES, 8, dtype=torch.float64))
    step()
    model[2] = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    step()


def _hinge(s: Any, x: Tensor) -> Tensor:
    """A margin between examples that is kept at first."""
    h = torch.tanh(s.a(x))
    distance = (h[:, None] - h[None]).pow(2).sum(-1)
    return s.b(h) + F.relu(s.share.max() - 10 + distance).sum(1, keepdim=True)


FADING_IN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "weight": lambda s, x: s.b((h := torch.tanh(s.a(x))) - s.share * h.mean(0)),
    "hinge": _hinge,
    "mask": lambda s, x: s.b((h := torch.tanh(s.a(x))) + h.roll(1, 0).where(s.share != 0, h * 0)),
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (1, 8)])
@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("name", FADING_IN)
def test_coupling_that_wakes_later(name: str, kind: str, shape: Any, forced: bool) -> None:
    """A tensor that is zero hides it from values at first; it is known from the first step on."""
    model = _model(FADING_IN[name])
    share = torch.zeros(shape, dtype=torch.float64)
    if kind == "buffer":
        model.register_buffer("share", share)
    else:
        model.share = share
    reweighter = Reweighter(model, cross_entropy, engine="layerwise" if forced else "auto")
    batches = vectors(6), vectors(4)
    for value in (0, 0, 20, 0):
        share.fill_(value)
        if not forced:
            assert_exact(model, cross_entropy, *batches, reweighter=reweighter)
            continue
        expected = truth(model, cross_entropy, *batches).scores
        try:
            found = reweighter.backward(*batches).scores
        except NotExactError:
            continue
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("count", [1, 8, 61, 62, 200])
def test_seeds_differ_for_examples_that_are_close(count: int) -> None:
    r = seeds(count, torch.device("cpu"), Probe().exponents())
    assert r.shape == (count,)
    for block in r.split(61):
        assert len(block.unique()) == len(block)
    mantissa, _ = torch.frexp(r)
    assert (mantissa == 0.5).all()
    few = seeds(count, torch.device("cpu"), range(8))
    assert float(few.max()) <= 128
    assert float(few.min()) >= 1


def test_forms_that_the_plan_chooses() -> None:
    """Factored for wide layers on a small clean batch, per example for many positions."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, CLASSES))
    batch, clean = (
        (torch.randn(64, 64), torch.randint(3, (64,))),
        (torch.randn(2, 64), torch.randint(3, (2,))),
    )
    layers = Reweighter(model, cross_entropy).explain(batch, clean).layers
    assert layers[0].form == "factored"
    image = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(20, 2, 16, 16)
    image(x)
    layers = (
        Reweighter(image, cross_entropy)
        .explain((x, torch.randint(3, (20,))), (x[:10] + 1, torch.randint(3, (10,))))
        .layers
    )
    assert layers[0].form == "per example"
    tied = model_of(lambda s, x: s.a(torch.tanh(s.a(x))), a=nn.Linear(5, 5))
    layers = Reweighter(tied, cross_entropy).explain(vectors(6), vectors(4)).layers
    assert all("joint" in layer.form for layer in layers)


def test_explanation() -> None:
    model = mlp()
    batches = vectors(6), vectors(4)
    with unchanged(model):
        explanation = Reweighter(model, cross_entropy).explain(*batches)
    assert explanation.engine == "layerwise"
    assert (explanation.n, explanation.m) == (6, 4)
    assert [layer.name for layer in explanation.layers] == ["0.weight, 0.bias", "2.weight, 2.bias"]
    data = json.loads(json.dumps(explanation.as_dict()))
    assert data["layers"][0]["operation"] == "linear"
    assert data["kept_bytes"] == explanation.kept_bytes > 0
    text = str(explanation)
    for part in ("layerwise", "0.weight, 0.bias", "linear", "6 training and 4 clean"):
        assert part in text
    asked = Reweighter(model, cross_entropy, engine="double_backward").explain(*[vectors(6)] * 2)
    assert "asked for" in str(asked)
    assert json.dumps(asked.as_dict())


def test_explanation_of_a_forced_engine_that_is_wrong() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
    batches = vectors(6), vectors(4)
    named = r"BatchNorm in train mode .*'1.weight'"
    with pytest.raises(NotExactError, match=named), unchanged(model):
        Reweighter(model, cross_entropy, engine="layerwise").explain(*batches)
    with unchanged(model):
        explanation = Reweighter(model, cross_entropy).explain(*batches)
    assert "'1.weight'" in explanation.reason


def test_later_steps_cost_one_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    calls = {"forward": 0, "backward": 0}
    model.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    run = layerwise._run_backward

    def counted(*args: Any, **kwargs: Any) -> None:
        calls["backward"] += 1
        run(*args, **kwargs)

    monkeypatch.setattr(layerwise, "_run_backward", counted)
    reweighter = Reweighter(model, cross_entropy)
    reweighter.backward(vectors(6), vectors(4))
    calls.update(forward=0, backward=0)
    reweighter.backward(vectors(6), vectors(4))
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: -F.log_softmax(out, 1).gather(1, y[:, None]).squeeze(1),
        lambda out, y: -F.log_softmax(out, 1)[torch.arange(len(y)), y],
    ],
)
def test_picking_the_class_in_the_loss_is_not_reordering(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    reweighter = Reweighter(model, loss)
    assert_exact(model, loss, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise")
    probed = []
    monkeypatch.setattr(layerwise, "Probe", lambda **_: probed.append(1))
    assert_exact(model, loss, vectors(6), vectors(4), reweighter=reweighter, engine="layerwise")
    assert not probed


def _centred(model: Any, x: Tensor) -> Tensor:
    """A branch in which examples reach each other, times a factor that is zero at first."""
    h = torch.tanh(model.a(x))
    return model.head(h + model.branch(torch.sin(h - h.mean(0))))


class _Times(nn.Module):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("factor", ["matrix", "parameter", "number", "tensor", "buffer"])
def test_coupling_behind_a_factor_that_is_zero_at_first(factor: str) -> None:
    branch: Any
    if factor == "matrix":
        branch = nn.Linear(8, 8)
        nn.init.zeros_(branch.weight)
    else:
        branch = _Times(0.0)
        zero: Any = {"number": 0.0, "parameter": nn.Parameter(torch.zeros(()))}
        branch.factor = zero.get(factor, torch.zeros((), dtype=torch.float64))
        if factor == "buffer":
            value = branch.__dict__.pop("factor")
            branch.register_buffer("factor", value)
    model = model_of(_centred, a=nn.Linear(5, 8), branch=branch, head=nn.Linear(8, CLASSES))
    reweighter = Reweighter(model, cross_entropy)
    batches = vectors(6), vectors(4)
    first = assert_exact(model, cross_entropy, *batches, reweighter=reweighter)
    assert first.engine == ("layerwise" if factor == "tensor" else "forward")  # nobody knows whose
    if factor == "matrix":
        nn.init.constant_(branch.weight, 0.1)
    elif isinstance(branch.factor, Tensor):
        branch.factor.data.fill_(0.1)
    else:
        branch.factor = 0.1
    assert_exact(model, cross_entropy, *batches, reweighter=reweighter, engine="forward")


def test_two_passes_make_a_plan_for_each_training_length_not_for_each_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    seen = layerwise.ExampleMap
    monkeypatch.setattr(layerwise, "ExampleMap", lambda *a, **k: made.append(1) or seen(*a, **k))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()

    def batch(n: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, length, 5).double(), torch.randint(CLASSES, (n, length))

    reweighter = Reweighter(model, token_loss)
    for length, clean_length in ((3, 4), (3, 5), (3, 6), (2, 4), (3, 4), (2, 7)):
        batches = batch(6, length), batch(4, clean_length)
        assert_exact(model, token_loss, *batches, reweighter=reweighter)
    assert len(made) == 2


def test_rates_are_those_of_the_device() -> None:
    with FakeTensorMode():
        on_cuda = torch.empty(2, device="cuda")
    assert costs.rates_of(torch.empty(2)) is costs.CPU
    assert costs.rates_of(None, on_cuda) is costs.CUDA
