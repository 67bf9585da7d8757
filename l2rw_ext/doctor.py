"""Reports what this installation consists of and whether it computes the right numbers.

``python -m l2rw_ext.doctor`` prints versions, the operator libraries (with the reason if one is not
loaded), CUDA architectures, instruction set and threads. It checks every operator and a small
:class:`~l2rw_ext.Reweighter` step against plain float64 torch in about a second; on a GPU it also
checks products that fill the GPU. It exits with status 1 if something is wrong.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import Reweighter, reference
from .devices import float32_products
from .ops import _native, _registration
from .reweighter import EngineName

__all__ = ["main"]

Results = tuple[Tensor, ...]
# Arguments of an operator and the plain function of them.
Case = tuple[tuple[Any, ...], Callable[..., Results]]
# What was checked, its relative error, and the error allowed.
Checked = tuple[str, float, float]

# Relative to the largest number of a result, by its dtype: sums of a few dozen terms, and whole
# models in float64.
_TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
# For sums of thousands of terms with either sign.
_TOLERANCE_LARGE = 1e-4
_TOLERANCE_TF32 = 5e-3


def _installation() -> Iterator[tuple[str, str]]:
    info = _native.BUILD_INFO
    yield "l2rw_ext", f"{info['version']} ({info['compiler']}, torch {info['torch_version']})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for library in _native.LIBRARIES:
        state = f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
        yield library.name, state
    if info["cuda_version"]:
        built = f"{info['cuda_architectures']} with CUDA {info['cuda_version']}"
    else:
        built = "none: built without CUDA"
    yield "CUDA architectures", built
    kernels = [name for name in _registration.OPERATORS if name not in _registration.COMPOSED]
    yield "CUDA operators", f"{', '.join(kernels) or 'none'}; all others composed of torch's"
    if torch.cuda.is_available():
        yield "CUDA device", torch.cuda.get_device_name()
        if os.environ.get("L2RW_CUDA_WARPGROUPS") == "1":
            yield "CUDA warpgroups", "asked for; compute capability 9.0 has them"
    isa = _native.instruction_set()
    yield "instruction set", f"{isa}, compiled for {info['instruction_sets']}"
    yield "threads", str(torch.get_num_threads())


def _convolve(z: Tensor, V: Tensor, V_b: Tensor | None = None) -> Tensor:
    return F.conv2d(z, V, V_b, stride=(2, 1), padding=(1, 0), groups=2)


def _conv_gradients(z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(4, 2, 3, 3, dtype=z.dtype, requires_grad=True)
    gradients = [
        torch.autograd.grad(_convolve(z[i : i + 1], weight), weight, g[i : i + 1])[0]
        for i in range(z.shape[0])
    ]
    return torch.stack(gradients), g.sum((2, 3))


def _operator_cases() -> dict[str, Case]:
    """Arguments of every operator and what it computes, in plain torch."""
    n, t, i, o, m, s = 4, 5, 9, 6, 3, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def scored(G: Tensor, G_b: Tensor, V: Tensor, V_b: Tensor) -> Results:
        return G, G_b, (G * V).flatten(1).sum(1) + (G_b * V_b).sum(1)

    def affine(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        return (g * (x - mean) * rstd).sum(1), g.sum(1)

    def group_norm(
        g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
    ) -> Results:
        grouped = (x.shape[0], groups, -1)
        normalized = ((x.reshape(grouped) - mean[..., None]) * rstd[..., None]).view_as(x)
        scaled = (g * weight.view(-1, 1, 1)).reshape(grouped)
        x_hat = normalized.reshape(grouped)
        slope = (scaled * x_hat).mean(2, keepdim=True)
        data = rstd[..., None] * (scaled - slope * x_hat - scaled.mean(2, keepdim=True))
        return data.view_as(x), (g * normalized).sum((2, 3)), g.sum((2, 3))

    def batch_norm_tangent(
        x: Tensor, dx: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, V: Tensor, V_b: Tensor
    ) -> Results:
        mean, rstd, weight, V, V_b = (c.view(-1, 1, 1) for c in (mean, rstd, weight, V, V_b))
        others = (0, 2, 3)
        x_hat = (x - mean) * rstd
        along = x_hat * (x_hat * dx).mean(others, keepdim=True)
        moved = dx - dx.mean(others, keepdim=True) - along
        return (weight * rstd * moved + x_hat * V + V_b,)

    def factored(z: Tensor, g: Tensor, zc: Tensor, gc: Tensor, bias: bool) -> Results:
        inner = torch.einsum("nti,msi->ntms", z, zc) + float(bias)
        return (torch.einsum("ntms,ntms->n", inner, torch.einsum("nto,mso->ntms", g, gc)),)

    generator = torch.Generator().manual_seed(0)
    z, g, V, V_b = draw(n, t, i), draw(n, t, o), draw(o, i), draw(o)
    x, h, mean, rstd = draw(n, t, i), draw(n, t, i), draw(n, t, 1), draw(n, 1, i)
    scale, shift = draw(i), draw(i)
    image, gradient, kernel, kernel_b = (
        draw(n, 4, 7, 6),
        draw(n, 4, 4, 4),
        draw(4, 2, 3, 3),
        draw(4),
    )
    geometry = ([2, 1], [1, 0], [1, 1], 2)
    index = torch.tensor([[0, 1, 2, 1, 0]] * n)
    w = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    active = w.nonzero().flatten()
    return {
        "factored_correlation": ((z, g, draw(m, s, i), draw(m, s, o), True), factored),
        "factored_correlations": (
            (
                [z, draw(n, 1, o)],
                [g, draw(n, 1, i)],
                [draw(m, s, i), draw(m, 1, o)],
                [draw(m, s, o), draw(m, 1, i)],
                [True, False],
            ),
            lambda *layers: (
                torch.stack([factored(*layer)[0] for layer in zip(*layers, strict=True)]).sum(0),
            ),
        ),
        "dense_correlation": (
            (z, g, V, V_b),
            lambda z, g, V, V_b: ((g * (z @ V.T + V_b)).sum((1, 2)),),
        ),
        "conv_correlation": (
            (image, gradient, kernel, kernel_b, *geometry),
            lambda z, g, V, V_b, *_: ((g * _convolve(z, V, V_b)).sum((1, 2, 3)),),
        ),
        "affine_correlation": (
            (x, h, mean, rstd, scale, shift),
            lambda x, g, mean, rstd, V, V_b: scored(*affine(x, g, mean, rstd), V, V_b)[2:],
        ),
        "embedding_correlation": (
            (index, h, draw(3, i)),
            lambda index, g, V: ((g * V[index]).sum((1, 2)),),
        ),
        "linear_example_gradients": (
            (z, g, V, V_b),
            lambda z, g, V, V_b: scored(torch.einsum("nto,nti->noi", g, z), g.sum(1), V, V_b),
        ),
        "conv_example_gradients": (
            (image, gradient, [3, 3], *geometry, kernel, kernel_b),
            lambda z, g, *rest: scored(*_conv_gradients(z, g), rest[-2], rest[-1]),
        ),
        "conv_weighted_gradient": (
            (image, gradient, w, [3, 3], *geometry),
            lambda z, g, w, *_: tuple(
                torch.einsum("n,n...->...", w, G) for G in _conv_gradients(z, g)
            ),
        ),
        "affine_example_gradients": ((x, h, mean, rstd), affine),
        "group_norm_backward": (
            (image.flip(0), image, draw(n, 2), draw(n, 2), kernel_b, 2),
            group_norm,
        ),
        "batch_norm_tangent": (
            (image, image.flip(0), *(draw(4) for _ in range(4)), kernel_b),
            batch_norm_tangent,
        ),
        "weighted_sum": ((z, w), lambda G, w: (torch.einsum("n,nti->ti", w, G),)),
        "scale_rows": (
            (g, w, active),
            lambda g, w, active: (g[active] * w[active, None, None],),
        ),
        "normalize_weights": (
            (torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64),),
            lambda u: (torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64),),
        ),
    }


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.cpu().double() - exact).abs().max() / exact.abs().max())


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _to(device: str, dtype: torch.dtype, argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.to(device, dtype if argument.is_floating_point() else argument.dtype)


def _check_operator(name: str, case: Case) -> Iterator[Checked]:
    arguments, plain = case
    for device in _devices():
        for dtype in _TOLERANCES:
            converted = pytree.tree_map(functools.partial(_to, device, dtype), arguments)
            # The plain function takes the numbers as this dtype rounds them.
            rounded = pytree.tree_map(functools.partial(_to, "cpu", torch.float64), converted)
            with float32_products(False):
                results = getattr(torch.ops.l2rw_ext, name)(*converted)
            results = results if isinstance(results, tuple) else (results,)
            for result, expected in zip(results, plain(*rounded), strict=True):
                error = _relative_error(result, expected)
                yield f"{device}, {str(dtype)[6:]}", error, _TOLERANCES[result.dtype]


def _check_large_products(device: str) -> Iterator[Checked]:
    """Check scores of large products, which run on every processor of a GPU."""
    n, m, i, o, pixels = 2100, 2500, 1100, 2600, 24
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    z, z_clean, g, V, V_b = draw(n, 1, i), draw(m, 1, i), draw(n, 1, o), draw(o, i), draw(o)
    h, h_clean = draw(n, 1, o // 4), draw(m, 1, o // 4)
    image, gradient = draw(40, 128, pixels, pixels), draw(40, 400, pixels, pixels)
    kernel, kernel_b = draw(400, 128, 3, 3), draw(400)
    padded = [1, 1], [1, 1], [1, 1], 1
    cases: dict[str, tuple[tuple[Any, ...], Callable[..., Tensor]]] = {
        "dense_correlation": (
            (z, g, V, V_b),
            lambda z, g, V, V_b: (g * (z @ V.T + V_b)).sum((1, 2)),
        ),
        "factored_correlation": (
            (z, h, z_clean, h_clean, True),
            lambda z, g, zc, gc, _: ((z[:, 0] @ zc[:, 0].T + 1) * (g[:, 0] @ gc[:, 0].T)).sum(1),
        ),
        "conv_correlation": (
            (image, gradient, kernel, kernel_b, *padded),
            lambda z, g, V, V_b, *_: (g * F.conv2d(z, V, V_b, padding=1)).sum((1, 2, 3)),
        ),
    }
    for name, (arguments, plain) in cases.items():
        for dtype, tf32 in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.bfloat16, False),
            (torch.float16, False),
        ):
            converted = pytree.tree_map(functools.partial(_to, device, dtype), arguments)
            rounded = pytree.tree_map(functools.partial(_to, device, torch.float64), converted)
            with float32_products(tf32):
                result = getattr(torch.ops.l2rw_ext, name)(*converted)
            error = _relative_error(result, plain(*rounded).cpu())
            label = f"{device}, {'TF32' if tf32 else str(dtype)[6:]}, {name}"
            yield label, error, _TOLERANCE_TF32 if tf32 else _TOLERANCE_LARGE


def _check_reweighter(engine: EngineName) -> Iterator[Checked]:
    """A step of a small convolutional model against single gradients, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),  # before batch norm a bias has no gradient
            nn.GroupNorm(2, 4) if engine == "layerwise" else nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        ).double()
        batch = torch.randn(6, 1, 6, 6).double(), torch.tensor([0, 1, 2, 0, 1, 2])
        clean = torch.randn(3, 1, 6, 6).double(), torch.tensor([0, 1, 2])

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    scores = reference.single_gradient_scores(model, losses, batch, clean)
    weights = reference.weights_from_scores(scores)
    gradients = reference.weighted_gradient(model, losses, batch, weights)
    for device in _devices():
        moved = copy.deepcopy(model).to(device)
        here, clean_here = ([x.to(device) for x in part] for part in (batch, clean))
        step = Reweighter(moved, losses, engine=engine).backward(here, clean_here)
        label = f"{device}, float64"
        yield f"{label}, scores", _relative_error(step.scores, scores), _TOLERANCES[torch.float64]
        yield (
            f"{label}, weights",
            _relative_error(step.weights, weights),
            _TOLERANCES[torch.float64],
        )
        errors = [
            _relative_error(parameter.grad, gradient)
            for parameter, gradient in zip(moved.parameters(), gradients.values(), strict=True)
            if parameter.grad is not None and gradient is not None
        ]
        complete = len(errors) == len(gradients)
        yield (
            f"{label}, gradient",
            max(errors) if complete else float("nan"),
            _TOLERANCES[torch.float64],
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _self_check() -> tuple[int, list[str]]:
    """The number of results checked, and one line for each that was wrong."""
    checks: dict[str, Callable[[], Iterator[Checked]]] = {
        name: functools.partial(_check_operator, name, case)
        for name, case in _operator_cases().items()
    }
    engines: tuple[EngineName, ...] = ("layerwise", "forward", "double_backward")
    for engine in engines:
        checks[f"engine {engine}"] = functools.partial(_check_reweighter, engine)
    if torch.cuda.is_available():
        checks["large products"] = functools.partial(_check_large_products, "cuda")
    checked = 0
    failures = []
    for name, check in checks.items():
        try:
            for what, error, tolerance in check():
                checked += 1
                if not error <= tolerance:  # a NaN fails
                    failures.append(
                        f"{name} ({what}): relative error {error:.1e}, allowed {tolerance:.0e}"
                    )
        except Exception as error:
            failures.append(f"{name}: {_first_line(error)}")
    return checked, failures


def main() -> int:
    """Print the report; 0 if all is well, 1 if not."""
    try:
        for subject, value in _installation():
            print(f"{subject:20}{value}")
        started = time.perf_counter()
        checked, failures = _self_check()
        seconds = time.perf_counter() - started
    except Exception as error:
        print(f"l2rw_ext.doctor could not finish: {_first_line(error)}")
        return 1
    verdict = "FAILED" if failures else "passed"
    print(f"{'self-check':20}{verdict}: {checked} results in {seconds:.2f} s")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
