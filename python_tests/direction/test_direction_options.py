"""Options that change the direction give the scores along a direction that is formed by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, cross_entropy, mlp, vectors
from support.oracle import EXACT, assert_matches, truth, unchanged

Gradients = dict[str, Tensor]


def _single_gradients(model: nn.Module, batch: Any) -> list[Gradients]:
    """∇f_i of each example by name."""
    model = copy.deepcopy(model)
    losses = cross_entropy(model(batch[0]), batch[1])
    named = dict(model.named_parameters())
    return [
        dict(
            zip(named, torch.autograd.grad(f, list(named.values()), retain_graph=True), strict=True)
        )
        for f in losses
    ]


def _along(model: nn.Module, batch: Any, direction: Gradients) -> Tensor:
    """u_i = <∇f_i, v> over the names in v."""
    return torch.stack(
        [
            torch.stack([(g[name] * v).sum() for name, v in direction.items()]).sum()
            for g in _single_gradients(model, batch)
        ]
    )


def _clean(model: nn.Module, clean: Any) -> Gradients:
    return reference.clean_direction(copy.deepcopy(model), cross_entropy, clean)


def _assert_scores(step: Any, model: nn.Module, batch: Any, direction: Gradients) -> None:
    exact = _along(model, batch, direction)
    assert relative_error(step.scores, exact) < EXACT
    weights = reference.weights_from_scores(exact)
    assert relative_error(step.weights, weights) < EXACT
    expected = reference.weighted_gradient(copy.deepcopy(model), cross_entropy, batch, weights)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, expected[name]) < EXACT  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["2"], ["2.weight", "2.bias"]),
        (["0.weight"], ["0.weight"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["0", "2.bias"], ["0.weight", "0.bias", "2.bias"]),
    ],
)
def test_a_subset_of_layers(engine: Any, layers: list[str], names: list[str]) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    step = Reweighter(model, cross_entropy, engine=engine, layers=layers).backward(batch, clean)
    v = _clean(model, clean)
    _assert_scores(step, model, batch, {name: v[name] for name in names})


@pytest.mark.parametrize("engine", ENGINES)
def test_l2_penalty_of_matrices_joins_the_clean_loss(engine: Any) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    step = Reweighter(model, cross_entropy, engine=engine, l2=0.3).backward(batch, clean)
    v = _clean(model, clean)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            v[name] = v[name] + 0.3 * p.detach()
    _assert_scores(step, model, batch, v)


def test_a_shared_parameter_is_chosen_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, CLASSES))
    model.double()
    model[2].weight = model[0].weight  # type: ignore[union-attr]
    batch, clean = vectors(6), vectors(4)
    v = _clean(model, clean)
    step = Reweighter(model, cross_entropy, layers=["2"]).backward(batch, clean)
    _assert_scores(step, model, batch, {name: v[name] for name in ("0.weight", "2.bias")})


def _train(model: nn.Module, lr: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= lr * p.grad
            p.grad = None


@pytest.mark.parametrize("engine", ENGINES)
def test_averaged_direction(engine: Any) -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, engine=engine, direction_decay=0.75)
    average: Gradients | None = None
    for _ in range(4):
        batch, clean = vectors(6), vectors(4)
        v = _clean(model, clean)
        average = v if average is None else {k: 0.75 * average[k] + 0.25 * v[k] for k in v}
        step = reweighter.backward(batch, clean)
        _assert_scores(step, model, batch, average)
        _train(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_direction_is_kept_between(engine: Any) -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, engine=engine, every=3)
    v: Gradients = {}
    for number in range(7):
        assert reweighter.needs_clean == (number % 3 == 0)
        batch, clean = vectors(6), vectors(4)
        if number % 3 == 0:
            v = _clean(model, clean)
        given = clean if number in (0, 1, 3, 6) else None
        step = reweighter.backward(batch, given)
        _assert_scores(step, model, batch, v)
        _train(model)


def test_dry_runs_leave_the_held_direction() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, every=2, direction_decay=0.5)
    first, batch = vectors(4), vectors(6)
    v = _clean(model, first)
    other = vectors(4)
    with unchanged(model):
        reweighter.weights(batch, other)
        reweighter.explain(batch, other)
    assert reweighter.needs_clean
    reweighter.backward(batch, first)
    model.zero_grad()
    reweighter.weights(batch)
    _assert_scores(reweighter.backward(batch), model, batch, v)


def test_a_clean_batch_that_is_needed_is_asked_for() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="clean batch: this step needs one"):
        Reweighter(model, cross_entropy, every=2).backward(vectors(6))
    with pytest.raises(TypeError, match="clean batch: this step needs one"):
        Reweighter(model, cross_entropy).backward(vectors(6))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_the_direction_that_is_held(how: str) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, every=2)
    v = _clean(model, clean)
    reweighter.backward(batch, clean)
    model.zero_grad()
    other = (
        copy.deepcopy(reweighter) if how == "deepcopy" else pickle.loads(pickle.dumps(reweighter))
    )
    _assert_scores(other.backward(batch), other.model, batch, v)


@pytest.mark.parametrize("change", ["exchanged", "unfrozen"])
def test_parameters_new_to_the_direction_need_a_clean_batch(change: str) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    layer: Any = model[0]
    layer.weight.requires_grad_(change != "unfrozen")
    reweighter = Reweighter(model, cross_entropy, every=3, direction_decay=0.5)
    reweighter.backward(batch, clean)
    held = _clean(model, clean)
    if change == "unfrozen":
        layer.weight.requires_grad_()
    else:
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    model.zero_grad()
    assert reweighter.needs_clean
    with unchanged(model), pytest.raises(TypeError, match="clean batch: this step needs one"):
        reweighter.backward(batch)
    v = {
        name: g if name == "0.weight" else 0.5 * (g + held[name])
        for name, g in _clean(model, clean).items()
    }
    _assert_scores(reweighter.backward(batch, clean), model, batch, v)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_direction_serves_when_parameters_are_frozen(preconditioned: bool) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    options: dict[str, Any] = {}
    if preconditioned:
        options["preconditioner"] = torch.optim.SGD(model.parameters(), lr=0.1)
    reweighter = Reweighter(model, cross_entropy, every=2, **options)
    reweighter.backward(batch, clean)
    v = _clean(model, clean)
    layer: Any = model[0]
    layer.weight.requires_grad_(False)
    step = reweighter.backward(batch)
    del v["0.weight"]
    assert relative_error(step.scores, _along(model.requires_grad_(), batch, v)) < EXACT


def test_the_direction_follows_the_model_to_another_dtype() -> None:
    model, batch, clean = mlp(dtype=torch.float32), vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, every=2)
    reweighter.backward((batch[0].float(), batch[1]), (clean[0].float(), clean[1]))
    v = {name: g.double() for name, g in _clean(model, (clean[0].float(), clean[1])).items()}
    model.zero_grad()
    model.double()
    step = reweighter.backward(batch)
    assert relative_error(step.scores, _along(model, batch, v)) < 1e-6


def test_an_average_in_low_precision_does_not_stand_still() -> None:
    """Half of what a step adds to it would be lost in bfloat16, and much more in the long run."""
    model = mlp(dtype=torch.bfloat16)
    batch, first, second = (vectors(6, dtype=torch.bfloat16) for _ in range(3))
    reweighter = Reweighter(model, cross_entropy, direction_decay=0.998)
    reweighter.backward(batch, first)
    for _ in range(400):
        reweighter.backward(batch, second)
    a, b = (
        {name: g.double() for name, g in _clean(model, clean).items()} for clean in (first, second)
    )
    left = 0.998**400
    v = {name: left * a[name] + (1 - left) * b[name] for name in a}
    double = copy.deepcopy(model).double()
    model.zero_grad()
    found = reweighter.backward(batch, second).scores
    assert relative_error(found, _along(double, (batch[0].double(), batch[1]), v)) < 0.03


@pytest.mark.parametrize("option", [{"l2": 0.1}, {"direction_decay": 0.5}, {"layers": ["0"]}])
def test_sparse_gradients(option: dict[str, Any]) -> None:
    def model_with(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(9, 5, mode="sum", sparse=sparse)
        return nn.Sequential(bag, nn.Linear(5, CLASSES)).double()

    (index, labels), other = ((torch.randint(9, (6, 3)), torch.randint(3, (6,))) for _ in range(2))
    found = []
    for sparse in (False, True):
        reweighter = Reweighter(model_with(sparse), cross_entropy, **option)
        for clean in (other, (index, labels)):
            step = reweighter.backward((index, labels), clean)
        found.append(step.scores)
    assert relative_error(found[1], found[0]) < EXACT


def test_scores_are_remembered_between() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, every=2, reuse="scores")
    x, y = vectors(12)
    first = reweighter.backward((x, y), vectors(4), index=range(12))
    model.zero_grad()
    order = torch.tensor([7, 2, 11, 5])
    explanation = reweighter.explain((x[order], y[order]), index=order)
    assert (explanation.engine, explanation.m, explanation.cost) == ("remembered", 0, 1)
    assert "remembered" in explanation.reason
    assert reweighter.explain((x[order], y[order])).engine == "layerwise"
    assert reweighter.explain((x, y), index=range(1, 13)).engine == "layerwise"  # 12 is unknown
    step = reweighter.backward((x[order], y[order]), index=order)
    assert step.engine == "remembered"
    assert torch.equal(step.scores, first.scores[order])
    weights = reference.weights_from_scores(first.scores[order])
    expected = reference.weighted_gradient(
        copy.deepcopy(model), cross_entropy, (x[order], y[order]), weights
    )
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert relative_error(p.grad, expected[name]) < EXACT  # type: ignore[arg-type]
    model.zero_grad()
    exact = truth(model, cross_entropy, (x, y), (x[:3] + 1, y[:3]))
    step = reweighter.backward((x, y), (x[:3] + 1, y[:3]), index=torch.arange(12))
    assert_matches(step, model, exact)
    assert step.engine == "layerwise"


def test_unknown_examples_are_scored_along_the_last_direction() -> None:
    model, clean, batch = mlp(), vectors(4), vectors(3)
    reweighter = Reweighter(model, cross_entropy, every=2, reuse="scores")
    reweighter.backward(vectors(6), clean, index=range(6))
    model.zero_grad()
    step = reweighter.backward(batch, index=[4, 5, 6])
    assert step.engine == "layerwise"
    _assert_scores(step, model, batch, _clean(model, clean))


def _second_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> Gradients:
    return {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_divides_by_the_root_of_the_second_moment(engine: Any, kind: Any) -> None:
    model = mlp()
    rates = [{"params": list(model[0].parameters())}]  # type: ignore[index]
    rates.append({"params": list(model[2].parameters()), "lr": 3e-3})  # type: ignore
    optimizer = kind(rates, lr=1e-3, eps=1e-6)
    reweighter = Reweighter(model, cross_entropy, engine=engine, preconditioner=optimizer)
    batch, clean = vectors(6), vectors(4)
    step = reweighter.backward(batch, clean)
    rate = {"0.weight": 1, "0.bias": 1, "2.weight": 3, "2.bias": 3}
    v = {name: g * rate[name] for name, g in _clean(model, clean).items()}
    _assert_scores(step, model, batch, v)
    optimizer.step()
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    moments = _second_moments(optimizer, model)
    v = _clean(model, clean)
    for name, g in v.items():
        corrected = 0.999 * moments[name] / (1 - 0.999**4)
        v[name] = rate[name] * g / (corrected.sqrt() + 1e-6)
    _assert_scores(reweighter.backward(batch, clean), model, batch, v)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "nesterov": True},
        {"weight_decay": 0.1, "dampening": 0.3},
    ],
)
def test_momentum_looks_where_sgd_goes(engine: Any, options: dict[str, Any]) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, **options)
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    # The optimiser's own step with a zero gradient leads to the look-ahead point at ε = 0.
    ahead = copy.deepcopy(model)
    follower = torch.optim.SGD(ahead.parameters(), lr=0.5, momentum=0.9, **options)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in ahead.parameters():
        p.grad = torch.zeros_like(p)
    follower.step()
    v = _clean(ahead, clean)
    before = [p.detach().clone() for p in model.parameters()]
    reweighter = Reweighter(model, cross_entropy, engine=engine, preconditioner=optimizer)
    step = reweighter.backward(batch, clean)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    _assert_scores(step, model, batch, v)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.0, 0.1)])
def test_rates_that_are_zero(rates: tuple[float, float]) -> None:
    """All of them, where they are warmed up from there; else that layer has no part."""
    model, batch, clean = mlp(), vectors(6), vectors(4)
    groups = [
        {"params": list(layer.parameters()), "lr": rate}
        for layer, rate in zip((model[0], model[2]), rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups)
    step = Reweighter(model, cross_entropy, preconditioner=optimizer).backward(batch, clean)
    v = _clean(model, clean)
    if rates[1]:
        v = {name: v[name] for name in ("2.weight", "2.bias")}
    _assert_scores(step, model, batch, v)


def test_parameters_that_join_adam_later() -> None:
    """Their moments are of another age, and their first is less of an average."""
    model, batch, clean = mlp(), vectors(6), vectors(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.2, amsgrad=True)
    model[2].requires_grad_(False)
    for step in range(4):
        if step == 2:
            model[2].requires_grad_()
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    v = _clean(model, clean)
    for name, p in model.named_parameters():
        state, t = optimizer.state[p], 5 if name.startswith("0") else 3
        moment = 0.999 * state["exp_avg_sq"] + 0.001 * (0.2 * p.detach()) ** 2
        moment = torch.maximum(moment, state["max_exp_avg_sq"]) / (1 - 0.999**t)
        rate = (1 - 0.9**5) / (1 - 0.9**t)
        v[name] = rate * v[name] / (moment.sqrt() + 1e-8)
    step = Reweighter(model, cross_entropy, preconditioner=optimizer).backward(batch, clean)
    _assert_scores(step, model, batch, v)


def test_parameters_are_back_after_an_error_at_the_look_ahead_point() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyboardInterrupt

    reweighter = Reweighter(model, cross_entropy, clean_loss_fn=broken, preconditioner=optimizer)
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        reweighter.backward(batch, clean)


def test_state_is_saved_and_loaded() -> None:
    model = mlp()
    options: dict[str, Any] = {"every": 2, "direction_decay": 0.5, "reuse": "scores"}
    first = Reweighter(model, cross_entropy, **options)
    batch = vectors(6)
    first.backward(batch, vectors(4), index=range(6))
    second = Reweighter(model, cross_entropy, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not second.needs_clean
    model.zero_grad()
    assert torch.equal(
        first.backward(batch, index=range(6)).scores, second.backward(batch, index=range(6)).scores
    )
    clean = vectors(4)
    a, b = (r.backward(batch, clean, index=range(6)).scores for r in (first, second))
    assert torch.equal(a, b)
    other = nn.Linear(5, CLASSES)
    with pytest.raises(ValueError, match="no such parameter"):
        Reweighter(other, cross_entropy).load_state_dict(first.state_dict())


def test_explain_names_the_options() -> None:
    model = mlp()
    reweighter = Reweighter(
        model,
        cross_entropy,
        every=4,
        direction_decay=0.5,
        layers=["2"],
        l2=0.1,
        preconditioner=torch.optim.Adam(model.parameters()),
    )
    text = str(reweighter.explain(vectors(6), vectors(4)))
    for part in ("every=4", "direction_decay=0.5", "layers=('2',)", "l2=0.1", "Adam"):
        assert part in text
    assert "option" not in str(Reweighter(model, cross_entropy).explain(vectors(6), vectors(4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"every": 1.5}, ValueError, "every must be"),
        ({"direction_decay": 1.0}, ValueError, r"direction_decay must be in \[0, 1\), got 1.0"),
        ({"l2": -1.0}, ValueError, "l2 must be"),
        ({"l2": float("nan")}, ValueError, "l2 must be"),
        ({"layers": "0"}, TypeError, "layers must be a list of names"),
        ({"layers": []}, ValueError, "layers: give at least one name"),
        ({"layers": ["5"]}, ValueError, "layers: '5' names no parameter or module"),
        ({"reuse": "weights"}, ValueError, "reuse must be one of"),
        ({"preconditioner": 3}, TypeError, "preconditioner must be"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Reweighter(mlp(), cross_entropy, **options)


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.Adam(mlp().parameters())
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(ValueError, match="does not hold all trainable"):
        Reweighter(model, cross_entropy, preconditioner=optimizer).backward(batch, clean)


def test_remembering_scores_needs_an_index() -> None:
    with pytest.raises(ValueError, match="index must be given"):
        Reweighter(mlp(), cross_entropy, every=2, reuse="scores").backward(vectors(6), vectors(4))


def test_a_refused_engine_leaves_the_masks_of_the_clean_batch_behind() -> None:
    """The same draws as with the engine that is taken in the end, not those of the clean batch."""
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    ).double()
    batch, clean = vectors(6), vectors(6)
    scores = []
    for engine in ("auto", "forward"):
        reweighter = Reweighter(copy.deepcopy(model), cross_entropy, engine=engine, l2=0.1)
        for _ in range(2):
            torch.manual_seed(3)
            scores.append(reweighter.backward(batch, clean).scores)
    assert all(torch.equal(u, scores[-1]) for u in scores)
