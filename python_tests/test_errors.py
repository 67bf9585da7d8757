"""Bad input is an error that names argument and value, and leaves the model as it was."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import CleanBatches, NotExactError, Reweighter
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import unchanged

METHODS = ["backward", "weights", "explain"]
_BATCH, _CLEAN = vectors(6), vectors(4)


def _used(model: nn.Module) -> nn.Module:
    """The model with gradients, hooks and advanced buffers: more that could be disturbed."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
        p.register_hook(lambda g: g)
    return model


def _with_buffers() -> nn.Module:
    """Dropout draws random numbers and spectral norm writes buffers before anything fails."""
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
    return _used(nn.Sequential(first, nn.Dropout(0.1), nn.Linear(8, CLASSES)).double())


def _coupled() -> nn.Module:
    """Examples that mix, after buffers were written."""
    return _used(
        nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, CLASSES)
        ).double()
    )


def _fails(
    error: type[Exception],
    match: str,
    batch: Any,
    clean: Any,
    *,
    model: nn.Module | None = None,
    loss_fn: Any = cross_entropy,
    methods: list[str] = METHODS,
    engines: tuple[str, ...] = ("auto", "layerwise", "double_backward"),
    **options: Any,
) -> None:
    for engine in engines:
        for method in methods:
            held = _used(mlp()) if model is None else model
            reweighter = Reweighter(held, loss_fn, engine=engine, **options)  # type: ignore[arg-type]
            call = getattr(reweighter, method)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(error, match=match), unchanged(held):
                    call(batch, clean)


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (F.cross_entropy, ValueError, r'loss_fn .*each of the \d examples.*reduction="none"'),
        (nn.CrossEntropyLoss(), ValueError, r'for example CrossEntropyLoss\(reduction="none"\)'),
        (
            lambda out, y: cross_entropy(out, y)[:-1],
            ValueError,
            r"shape \(\d,\), got shape \(\d,\)",
        ),
        (
            lambda out, y: (out - 1).abs(),
            ValueError,
            r"got shape \(\d, 3\).*losses.flatten\(1\).sum\(1\)",
        ),
        (
            lambda out, y: cross_entropy(out, y).tolist(),
            TypeError,
            "must return a tensor.*got list",
        ),
        (lambda out, y: out.argmax(1), TypeError, "must return floating losses, got torch.int64"),
        (lambda out, y: None, TypeError, "got NoneType"),
    ],
)
def test_losses_of_the_wrong_kind(loss_fn: Any, error: type[Exception], match: str) -> None:
    batches = vectors(6), vectors(4)
    _fails(error, match, *batches, loss_fn=loss_fn, methods=["backward", "weights"])
    _fails(error, match, *batches, loss_fn=loss_fn, model=_with_buffers(), methods=["backward"])
    _fails(
        error,
        "clean batch: .*" + match,
        *batches,
        loss_fn=cross_entropy,
        clean_loss_fn=loss_fn,
        methods=["backward"],
    )


def test_losses_of_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tokens, clean = torch.randint(9, (6, 5)), torch.randint(9, (6, 5))

    def fails(match: str, reduction: str) -> None:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)

        _fails(ValueError, match, (tokens, tokens), (clean, clean), model=model, loss_fn=loss_fn)

    fails(r'reduction="none"\), and average the positions of each example', "mean")
    fails(r"losses.view\(6, 5\).mean\(1\)", "none")


def test_loss_function_that_raises() -> None:
    def broken(out: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError("no loss today")

    for model in (None, _with_buffers()):
        _fails(
            ZeroDivisionError,
            "no loss today",
            vectors(6),
            vectors(4),
            loss_fn=broken,
            model=model,
            methods=["backward", "weights"],
        )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["training", "clean"])
def test_an_error_of_the_model_says_in_which_batch(engine: Any, part: str) -> None:
    x, y = vectors(4)
    batches = {"training": vectors(6), "clean": vectors(4), part: (x[:, :3], y)}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        Reweighter(mlp(), cross_entropy, engine=engine).backward(*batches.values())
    assert f"raised in the forward of the {part} batch" in str(caught.value.__notes__)


@pytest.mark.parametrize("part", ["training", "clean"])
def test_empty_batch(part: str) -> None:
    batches = (vectors(0), vectors(4)) if part == "training" else (vectors(6), vectors(0))
    _fails(ValueError, f"{part} batch: the batch is empty", *batches)


@pytest.mark.parametrize("part", ["training", "clean"])
def test_sizes_that_disagree(part: str) -> None:
    wrong = vectors(7)[0], vectors(4)[1]
    batches = (wrong, vectors(4)) if part == "training" else (vectors(6), wrong)
    match = r"Expected input batch_size \(7\) to match target batch_size \(4\)"  # torch's own
    _fails(ValueError, match, *batches)


def test_batch_that_is_no_pair() -> None:
    x, y = vectors(6)
    _fails(TypeError, r"training batch: expected a pair .*, got Tensor", x, vectors(4))
    _fails(TypeError, "got CleanBatches; give one batch of it", (x, y), CleanBatches((x, y)))
    _fails(TypeError, "training batch: .*got tuple of length 3; .*as index=", (x, y, y), vectors(4))
    _fails(TypeError, "clean batch: this step needs one", (x, y), None)
    data = torch.utils.data.TensorDataset(x, y)
    _fails(TypeError, "got TensorDataset of length 6; give one batch of it", (x, y), data)
    _fails(TypeError, "clean batch: expected a pair", (x, y), {"x": x, "y": y})
    _fails(TypeError, "training batch: inputs must be a tensor.*got list", ([1, 2], y), vectors(4))
    _fails(
        TypeError, "training batch: inputs must be a tensor.*got ndarray", (x.numpy(), y), (x, y)
    )


def test_batch_without_examples() -> None:
    scalar = torch.zeros((), dtype=torch.float64)
    _fails(ValueError, "says how many examples there are", (scalar, scalar), vectors(4))


def test_inputs_that_differ_in_structure() -> None:
    x, y = vectors(6)
    _fails(ValueError, "structure: a tuple of 2 and a tuple of 1", ((x, x), y), ((x,), y))
    _fails(ValueError, "keys a, b and a dict with keys a", ({"a": x, "b": x}, y), ({"a": x}, y))
    _fails(ValueError, "differ in structure", (x, y), ((x,), y))


def test_dtypes_that_differ() -> None:
    x, y = vectors(6)
    _fails(
        ValueError,
        "training inputs have dtype torch.float64, clean inputs torch.float32",
        (x, y),
        (x.float(), y),
    )


def test_devices_that_differ() -> None:
    x, y = vectors(6)
    _fails(
        ValueError,
        "training inputs are on cpu, clean inputs on meta",
        (x, y),
        (x.to("meta"), y),
    )


def test_inputs_that_were_computed_with_grad() -> None:
    x, y = vectors(6)
    _fails(
        ValueError,
        r"training batch: an input of shape \(6, 5\) was computed with grad.*x.detach\(\)",
        (x.clone().requires_grad_() * 2, y),
        vectors(4),
    )


def test_inputs_made_under_inference_mode() -> None:
    with torch.inference_mode():
        x, y = vectors(6)
    _fails(ValueError, "made under torch.inference_mode", (x, y), vectors(4))


def test_input_of_another_dtype_than_the_model() -> None:
    x, y = vectors(6, dtype=torch.float32)
    _fails(RuntimeError, "dtype", (x, y), (x, y), methods=["backward", "weights"])


@pytest.mark.parametrize(
    ("mode", "name"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")]
)
def test_without_gradients(mode: Any, name: str) -> None:
    model = _used(mlp())
    batches = vectors(6), vectors(4)
    for method in METHODS:
        with mode(), pytest.raises(RuntimeError, match=f"call this outside of torch.{name}"):
            getattr(Reweighter(model, cross_entropy), method)(*batches)


def test_model_without_trainable_parameters() -> None:
    _fails(
        ValueError,
        "no parameter that requires grad",
        vectors(6),
        vectors(4),
        model=mlp().requires_grad_(False),
    )


def test_losses_that_no_parameter_reaches() -> None:
    for loss in (lambda out, y: torch.ones(len(y)), lambda out, y: cross_entropy(out.detach(), y)):
        _fails(
            ValueError,
            "training batch: the losses do not depend on any trainable parameter",
            vectors(6),
            vectors(4),
            loss_fn=loss,
            methods=["backward", "weights"],
        )


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy)
    with pytest.raises(ValueError, match="uninitialised lazy parameters; run one forward"):
        reweighter.backward(vectors(6), vectors(4))
    model(vectors(1)[0])
    assert reweighter.backward(vectors(6), vectors(4)).engine == "layerwise"


@pytest.mark.parametrize("when", ["training", "clean", "after a layer"])
def test_model_that_raises(when: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.steps.add_(1)
        h = F.dropout(model.a(x), 0.5)
        if when == "after a layer" or (when == "training") == bool((x < 50).all()):
            raise OverflowError("model broke")
        return model.b(h)

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES))
    model.register_buffer("steps", torch.zeros(()))
    x, y = vectors(4)
    batches = vectors(6), (x + 100, y)
    methods = ["backward", "weights"]
    _fails(OverflowError, "model broke", *batches, model=_used(model), methods=methods)
    with pytest.raises(OverflowError, match="model broke"), unchanged(model):
        Reweighter(model, cross_entropy).explain(*batches)


def test_model_that_raises_in_its_backward() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise OverflowError("backward broke")

    model = _used(model_of(lambda s, x: Broken.apply(s.a(x)), a=nn.Linear(5, CLASSES)))
    _fails(
        OverflowError,
        "backward broke",
        vectors(6),
        vectors(4),
        model=model,
        methods=["backward", "weights"],
    )


def test_interrupted_step() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = _with_buffers()
    for engine in ("auto", "double_backward"):
        with pytest.raises(KeyboardInterrupt), unchanged(model):
            Reweighter(model, loss, engine=engine).backward(_BATCH, _CLEAN)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_clean_loss(value: str) -> None:
    x, y = vectors(4)
    x[1, 1] = float("nan")
    if value == "nan":
        for model in (None, _with_buffers()):
            _fails(
                ValueError,
                "clean batch: the mean loss is nan.*No gradient was accumulated",
                vectors(6),
                (x, y),
                model=model,
                methods=["backward", "weights"],
            )
    else:
        _fails(
            ValueError,
            "clean batch: the mean loss is inf",
            vectors(6),
            vectors(4),
            clean_loss_fn=lambda out, y: cross_entropy(out, y) * float("inf"),
            methods=["backward", "weights"],
        )


def test_clean_gradient_that_overflows() -> None:
    clean_loss = lambda out, y: (out.sum(1) * 0).abs().sqrt()  # noqa: E731
    _fails(
        ValueError,
        "no score is finite.*overflowed",
        vectors(6),
        vectors(4),
        clean_loss_fn=clean_loss,
        methods=["backward", "weights"],
    )


def test_non_finite_training_loss_where_examples_mix() -> None:
    x, y = vectors(6)
    x[2, 0] = float("nan")
    _fails(
        ValueError,
        r"training batch: losses of examples \[2\] are not finite",
        (x, y),
        vectors(4),
        engines=("double_backward",),
        methods=["backward", "weights"],
    )
    model = _coupled()
    _fails(
        ValueError,
        "losses of examples .* are not finite",
        (x, y),
        vectors(4),
        model=model,
        engines=("auto", "double_backward"),
        methods=["backward", "weights"],
    )


def test_gradient_of_one_training_example_that_overflows() -> None:
    """A finite loss with an infinite gradient: that example is left out and counted."""
    model = mlp()

    def loss(out: Tensor, targets: Any) -> Tensor:
        y, hit = targets
        total = out.sum(1)
        steep = (total - total.detach() + ~hit).abs().sqrt()
        return cross_entropy(out, y) + steep

    x, y = vectors(6)
    hit = torch.arange(6) == 3
    clean = vectors(4)
    reweighter = Reweighter(model, loss, clean_loss_fn=cross_entropy, engine="double_backward")
    with pytest.raises(ValueError, match=r"gradients of examples \[3\] are not finite"):
        reweighter.backward((x, (y, hit)), clean)
    assert all(p.grad is None for p in model.parameters())
    step = Reweighter(model, loss, clean_loss_fn=cross_entropy).backward((x, (y, hit)), clean)
    assert step.losses.isfinite().all()
    assert step.nonfinite == 1
    assert step.weights[3] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_forced_engine_where_it_would_be_wrong() -> None:
    for method in METHODS:
        model = _coupled()
        with (
            pytest.raises(NotExactError, match=r"BatchNorm in train mode.*'1.weight'"),
            unchanged(model),
        ):
            getattr(Reweighter(model, cross_entropy, engine="layerwise"), method)(_BATCH, _CLEAN)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((mlp, cross_entropy), {}, TypeError, "model must be a torch.nn.Module, got function"),
        ((None, cross_entropy), {}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        ((mlp(), None), {}, TypeError, "loss_fn must be callable, got NoneType"),
        ((mlp(), cross_entropy), {"clean_loss_fn": 3}, TypeError, "clean_loss_fn must be callable"),
        ((mlp(), cross_entropy), {"engine": "fast"}, ValueError, r"engine must be .*got 'fast'"),
        (
            (mlp(), cross_entropy),
            {"low_memory": 2},
            ValueError,
            r"low_memory must be one of False, True, 'auto', got 2",
        ),
        (
            (mlp(), cross_entropy),
            {"on_degenerate": "ignore"},
            ValueError,
            r"on_degenerate must be one of 'zero', 'uniform', 'skip', got 'ignore'",
        ),
    ],
)
def test_arguments(arguments: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Reweighter(*arguments, **options)


def test_after_an_error_the_next_step_is_as_if_nothing_had_happened() -> None:
    model = _with_buffers().eval()
    model.zero_grad()
    untouched = copy.deepcopy(model)
    reweighter = Reweighter(model, cross_entropy)
    with pytest.raises(ValueError, match="empty"):
        reweighter.backward(vectors(0), _CLEAN)
    x, y = _CLEAN
    with pytest.raises(ValueError, match="clean batch"):
        reweighter.backward(_BATCH, (x * float("nan"), y))
    step = reweighter.backward(_BATCH, _CLEAN)
    expected = Reweighter(untouched, cross_entropy).backward(_BATCH, _CLEAN)
    assert torch.equal(step.scores, expected.scores)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)
