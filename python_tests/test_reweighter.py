"""``Reweighter`` does what a training loop expects of it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINE_OPTIONS, cross_entropy, mlp, model_of, vectors
from support.oracle import (
    assert_exact,
    assert_matches,
    flat,
    gradients_of,
    truth,
    unchanged,
)


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_gradients_accumulate(engine: Any) -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    total: dict[str, Tensor] = {}
    for _ in range(3):
        batch, clean = vectors(6), vectors(4)
        for name, g in truth(model, cross_entropy, batch, clean).gradients.items():
            assert g is not None
            total[name] = total.get(name, torch.zeros_like(g)) + g
        reweighter.backward(batch, clean)
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(total.values())) < 1e-12


def test_gradients_join_those_of_a_plain_backward() -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    model(batch[0]).sum().backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    plain = {name: g.clone() for name, g in before.items() if g is not None}
    Reweighter(model, cross_entropy).backward(batch, clean)
    for name, p in model.named_parameters():
        exact = expected.gradients[name]
        assert p.grad is before[name]
        assert p.grad is not None
        assert exact is not None
        assert relative_error(p.grad - plain[name], exact) < 1e-12


@pytest.mark.parametrize("engine", ["layerwise", "forward", "double_backward"])
def test_gradients_look_like_those_of_a_plain_backward(engine: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )
    x = torch.randn(6, 2, 6, 6)
    model(x)
    model.to(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (6,))
    plain = copy.deepcopy(model)
    cross_entropy(plain(x), y).mean().backward()
    Reweighter(model, cross_entropy, engine=engine).backward((x, y), (x[:3] + 1, y[:3]))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad.dtype, p.grad.shape) == (q.grad.dtype, q.grad.shape)
        assert p.grad.stride() == q.grad.stride()
        assert p.grad.grad_fn is None
        assert not p.grad.requires_grad
    pointers = {
        p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None
    }
    assert len(pointers) == len(list(model.parameters()))


def test_gradients_of_parameters_that_are_added_do_not_share_memory() -> None:
    model = model_of(
        lambda s, x: s.head(x * (s.p + s.q.view(5))),
        p=torch.randn(5),
        q=torch.randn(1, 5),
        head=nn.Linear(5, CLASSES),
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
    assert model.p.grad.untyped_storage().data_ptr() != model.q.grad.untyped_storage().data_ptr()


def test_post_accumulate_hooks_can_step_an_optimizer() -> None:
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = copy.deepcopy(model)
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    Reweighter(model, cross_entropy).backward(batch, clean)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        exact = expected.gradients[name]
        assert exact is not None
        assert p.grad is None
        assert torch.allclose(p, q - 0.1 * exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.Adam(p, lr=0.05, foreach=True, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.02),
        lambda p: torch.optim.Adagrad(p, lr=0.2),
    ],
)
def test_any_optimizer_follows(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The clean loss falls, with labels of which a third is wrong."""
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters()}]
    optimizer = make(groups)
    reweighter = Reweighter(model, cross_entropy)
    x = torch.randn(60, 5, dtype=torch.float64)
    y = x[:, :CLASSES].argmax(1)
    noisy = torch.where(torch.arange(60) % 3 == 0, (y + 1) % CLASSES, y)
    clean_x = torch.randn(20, 5, dtype=torch.float64)
    clean = clean_x, clean_x[:, :CLASSES].argmax(1)
    losses = []
    weights = torch.zeros(60, dtype=torch.float64)
    for _ in range(40):
        step = reweighter.backward((x, noisy), clean)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(step.clean_loss))
        weights += step.weights
    assert losses[-1] < 0.7 * losses[0]
    wrong = torch.arange(60) % 3 == 0
    assert weights[wrong].mean() < weights[~wrong].mean() / 2


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_lbfgs_calls_the_step_as_its_closure(engine: Any) -> None:
    """The parameters end where closures of the oracle's losses and gradients would take them."""
    model = mlp()
    expected = copy.deepcopy(model)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    batch, clean = vectors(6), vectors(4)
    calls = []

    def closure() -> float:
        calls.append("reweighter")
        optimizer.zero_grad()
        return float(reweighter.backward(batch, clean).loss)

    def oracle() -> float:
        calls.append("oracle")
        weights = reference.weights_from_scores(
            reference.single_gradient_scores(expected, cross_entropy, batch, clean)
        )
        gradients = reference.weighted_gradient(expected, cross_entropy, batch, weights)
        for p, gradient in zip(expected.parameters(), gradients.values(), strict=True):
            p.grad = gradient
        return float(weights @ cross_entropy(expected(batch[0]), batch[1]).detach())

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    optimizer.step(closure)
    torch.optim.LBFGS(expected.parameters(), max_iter=5).step(oracle)
    assert calls.count("reweighter") == calls.count("oracle") > 1
    assert relative_error(flat(model.parameters()), flat(expected.parameters())) < 1e-9


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
@pytest.mark.parametrize("method", ["weights", "explain"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_weights_and_explain_leave_everything_untouched(
    engine: Any, method: str, used: bool
) -> None:
    models = [
        nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double(),
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, CLASSES)
        ).double(),
    ]
    if engine != "layerwise":
        models.append(
            nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
        )
    batch, clean = vectors(6), vectors(4)
    for model in models:
        reweighter = Reweighter(model, cross_entropy, engine=engine)
        if used:
            reweighter.backward(batch, clean)
        with unchanged(model):
            found = getattr(reweighter, method)(batch, clean)
        if method == "weights":
            state = torch.get_rng_state()
            step = Reweighter(copy.deepcopy(model), cross_entropy, engine=engine).backward(
                batch, clean
            )
            assert torch.equal(found, step.weights)
            torch.set_rng_state(state)


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_a_step_changes_gradients_alone(engine: Any) -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    x, clean_x = batch[0].clone(), clean[0].clone()
    parameters = copy.deepcopy(model.state_dict())
    reweighter = Reweighter(model, cross_entropy, engine=engine, on_degenerate="skip")
    reweighter.backward(batch, clean)
    model.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name])
    assert torch.equal(batch[0], x)
    assert torch.equal(clean[0], clean_x)
    assert torch._C._len_torch_function_stack() == 0


def test_dropout_draws_new_masks_each_step() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy)
    batch, clean = vectors(6), vectors(4)
    scores = [reweighter.backward(batch, clean).scores for _ in range(4)]
    for i in range(3):
        assert not torch.equal(scores[i], scores[i + 1])


class _Counting(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_inside_a_function_mode_of_the_user(engine: Any) -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        model.zero_grad()
        with _Counting() as mode:
            step = reweighter.backward(batch, clean)
        assert mode.calls
        assert_matches(step, model, expected)


def test_model_that_enters_a_function_mode() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.device("cpu"), _Counting():
            return model.b(torch.tanh(model.a(x) + torch.zeros(8)))

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("option", ["zero", "uniform", "skip"])
def test_default_device(engine: Any, device: str, n: int, option: Any) -> None:
    """Tensors of the step follow the data, wherever new tensors go by default."""
    model = nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten()
    ).double()
    batch, clean = vectors(n), vectors(n // 2)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine=engine, on_degenerate=option)
    try:
        torch.set_default_device(device)
        for _ in range(2):
            model.zero_grad()
            step = reweighter.backward(batch, clean)
            reweighter.weights(batch, clean)
            str(reweighter.explain(batch, clean))
            assert step.loss.device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert_matches(step, model, expected, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(dtype: torch.dtype) -> None:
    model = mlp(dtype=torch.float32)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    expected = truth(model, cross_entropy, batch, clean)
    torch.set_default_dtype(dtype)
    try:
        step = Reweighter(model, cross_entropy).backward(batch, clean)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_matches(step, model, expected, tolerance=1e-6)
    assert step.scores.dtype == torch.float32


@pytest.mark.parametrize("engine", ["layerwise", "forward", "double_backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_in_the_accumulation_dtype(engine: Any, dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    batch, clean = vectors(6, dtype=dtype), vectors(4, dtype=dtype)
    step = Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert step.scores.dtype == step.weights.dtype == wide
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_another_loss_function_on_the_same_reweighter() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy)
    batches = vectors(6), vectors(4)
    assert_exact(model, cross_entropy, *batches, reweighter=reweighter, engine="layerwise")

    def contrastive(out: Tensor, y: Tensor) -> Tensor:
        return -F.log_softmax(out @ out.t(), 1).diagonal()

    reweighter.loss_fn = contrastive
    assert_exact(model, contrastive, *batches, reweighter=reweighter, engine="forward")


def test_anomaly_detection() -> None:
    model = mlp()
    with torch.autograd.set_detect_anomaly(True):
        assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_loss_function_that_writes_to_the_outputs() -> None:
    model = model_of(lambda s, x: s.head(x) * s.scale, head=nn.Linear(5, 3), scale=torch.ones(3))
    loss = lambda out, y: cross_entropy(out.mul_(2), y)  # noqa: E731
    assert_exact(model, loss, vectors(6), vectors(4), engine="layerwise")


def test_two_threads() -> None:
    """Each with a Reweighter of its own, at the same time."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(model: nn.Module, batches: list[Any], expected: list[Any]) -> None:
        try:
            reweighter = Reweighter(model, cross_entropy)
            barrier.wait()
            for (batch, clean), exact in zip(batches, expected, strict=True):
                model.zero_grad()
                assert_matches(reweighter.backward(batch, clean), model, exact)
        except BaseException as error:
            failures.append(error)

    threads = []
    for _ in range(2):
        model = mlp()
        batches = [(vectors(6), vectors(4)) for _ in range(20)]
        expected = [truth(model, cross_entropy, *b) for b in batches]
        threads.append(threading.Thread(target=work, args=(model, batches, expected)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_reweighters_of_one_model() -> None:
    model = mlp()
    a, b = (
        Reweighter(model, cross_entropy),
        Reweighter(model, cross_entropy, engine="double_backward"),
    )
    for _ in range(3):
        batch, clean = vectors(6), vectors(4)
        assert relative_error(a.weights(batch, clean), b.weights(batch, clean)) < 1e-12


def test_nested_model_inside_a_wrapper() -> None:
    inner = mlp()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = inner

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    batch, clean = vectors(6), vectors(4)
    expected = truth(inner, cross_entropy, batch, clean)
    step = Reweighter(Wrapper(), cross_entropy).backward(batch, clean)
    assert_matches(step, inner, expected)


def test_loss_function_as_a_module() -> None:
    model = mlp()
    loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    assert_exact(model, loss, vectors(6), vectors(4), engine="layerwise")


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_scale_of_a_sequence_loss_changes_scores_not_weights(reduce: str) -> None:
    model = nn.Linear(5, CLASSES).double()
    x, clean_x = torch.randn(6, 4, 5).double(), torch.randn(3, 4, 5).double()
    y, clean_y = torch.randint(CLASSES, (6, 4)), torch.randint(CLASSES, (3, 4))

    def loss(out: Tensor, target: Tensor) -> Tensor:
        flat_loss = F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="none")
        return getattr(flat_loss.view(target.shape), reduce)(1)

    step = assert_exact(model, loss, (x, y), (clean_x, clean_y), engine="layerwise")
    summed = Reweighter(
        model, lambda out, t: loss(out, t) * (4 if reduce == "mean" else 1)
    ).backward((x, y), (clean_x, clean_y))
    factor = 16 if reduce == "mean" else 1
    assert torch.allclose(summed.scores, factor * step.scores)
    assert torch.allclose(summed.weights, step.weights)


class _WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_one_warning_for_a_reason() -> None:
    """Of the engine that costs three times a plain step; the others need none."""
    model = model_of(
        lambda s, x: s.b(_WithoutForwardMode.apply(s.norm(s.a(x)))),
        a=nn.Linear(5, 8),
        norm=nn.BatchNorm1d(8),
        b=nn.Linear(8, CLASSES),
    )
    reweighter = Reweighter(model, cross_entropy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (6, 5, 6):
            reweighter.backward(vectors(n), vectors(4))
            reweighter.weights(vectors(n), vectors(4))
            reweighter.explain(vectors(n), vectors(4))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "'norm.weight'" in str(caught[0].message)
    assert "forward mode AD. Using the double_backward engine" in str(caught[0].message)
