"""The fixed benchmark cases: model, batch sizes, data, and labels drawn for a known share ρ.

ρ, the share of examples with a positive weight, decides what the weighted gradient costs. By chance
it is anywhere from a third to nearly all of the batch, so labels are drawn until 45-55% of the
scores are positive; ρ stands beside every ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import GPT, LSTM, MLP, Autocast, LeNet, ResNet32, ViT, low_rank

RHO_RANGE = (0.45, 0.55)
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
Batch = tuple[Tensor, Tensor]


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each example; the mean over tokens where an example has several."""
    if outputs.dim() == 2:
        return F.cross_entropy(outputs, targets, reduction="none")
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


@dataclass(frozen=True)
class CaseSpec:
    """What a case is made from; :func:`make_case` makes it.

    ``coupled`` marks models whose examples see each other (BatchNorm in train mode), ``attention``
    those whose fused attention kernel has no second derivative. Inputs are images of shape
    ``input_shape``, or tokens of that shape where ``tokens`` is set (targets then have it too).
    ``bf16`` marks models that run under bfloat16 autocast.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    n: int
    m: int
    default: bool = True
    coupled: bool = False
    attention: bool = False
    tokens: bool = False
    bf16: bool = False


@dataclass
class Case:
    """A model in train mode with a training batch of n and a clean batch of m examples."""

    spec: CaseSpec
    model: nn.Module
    train: Batch
    clean: Batch
    rho: float

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Unreduced losses, shape (n,)."""
        return example_losses(outputs, targets)

    @property
    def union(self) -> Batch:
        """Both batches as one."""
        (x, y), (x_clean, y_clean) = self.train, self.clean
        return torch.cat([x, x_clean]), torch.cat([y, y_clean])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def copy(self) -> Case:
        """The same data with a model of its own."""
        model = copy.deepcopy(self.model)
        return Case(self.spec, model, self.train, self.clean, self.rho)

    def to(self, device: torch.device | str) -> Case:
        """The case with model and data on ``device``."""
        x, y = (t.to(device) for t in self.train)
        xc, yc = (t.to(device) for t in self.clean)
        model = self.model.to(device)
        return Case(self.spec, model, (x, y), (xc, yc), self.rho)


def _mlp() -> nn.Module:
    return MLP(784, 1024, 1024, 10)


def _resnet_group() -> nn.Module:
    return ResNet32("group")


def _resnet_batch() -> nn.Module:
    return ResNet32("batch")


def _vit_checkpointed() -> nn.Module:
    return ViT(checkpointed=True)


def _tiny() -> nn.Module:
    return MLP(6, 8, 3)


def _low_rank_gpt() -> nn.Module:
    return low_rank(GPT())


def _autocast(model: Callable[[], nn.Module]) -> nn.Module:
    return Autocast(model())


def _under_autocast(spec: CaseSpec) -> CaseSpec:
    """The same case under bfloat16 autocast."""
    return replace(
        spec,
        name=f"{spec.name}-bf16",
        title=f"{spec.title}, bfloat16",
        model=partial(_autocast, spec.model),
        bf16=True,
    )


_IMAGE = (3, 32, 32)
_SIXTEENTH = (
    CaseSpec(
        "gpt-32-2",
        "GPT d 256, 4 layers, 32+2",
        GPT,
        (128,),
        1000,
        32,
        2,
        default=False,
        attention=True,
        tokens=True,
    ),
    CaseSpec(
        "vit-128-8",
        "ViT d 192, 6 layers, 128+8",
        ViT,
        _IMAGE,
        10,
        128,
        8,
        default=False,
        attention=True,
    ),
    CaseSpec(
        "lora-32-2",
        "LoRA of rank 8 on the GPT, 32+2",
        _low_rank_gpt,
        (128,),
        1000,
        32,
        2,
        default=False,
        attention=True,
        tokens=True,
    ),
)
"""Cases with m = n/16, about the share with which others state their price."""
CASES: dict[str, CaseSpec] = {
    spec.name: spec
    for spec in (
        CaseSpec("mlp-256-64", "MLP 784-1024-1024-10, 256+64", _mlp, (784,), 10, 256, 64),
        CaseSpec("mlp-100-10", "MLP 784-1024-1024-10, 100+10", _mlp, (784,), 10, 100, 10),
        CaseSpec("lenet", "LeNet, 100+10", LeNet, (1, 28, 28), 10, 100, 10),
        CaseSpec(
            "resnet-100-100", "ResNet-32/GroupNorm, 100+100", _resnet_group, _IMAGE, 10, 100, 100
        ),
        CaseSpec(
            "resnet-100-10", "ResNet-32/GroupNorm, 100+10", _resnet_group, _IMAGE, 10, 100, 10
        ),
        CaseSpec("vit", "ViT d 192, 6 layers, 64+16", ViT, _IMAGE, 10, 64, 16, attention=True),
        CaseSpec(
            "resnet-bn-100-100",
            "ResNet-32/BatchNorm, 100+100",
            _resnet_batch,
            _IMAGE,
            10,
            100,
            100,
            coupled=True,
        ),
        CaseSpec(
            "resnet-bn-100-10",
            "ResNet-32/BatchNorm, 100+10",
            _resnet_batch,
            _IMAGE,
            10,
            100,
            10,
            coupled=True,
        ),
        CaseSpec(
            "vit-checkpointed",
            "ViT, every block checkpointed, 64+16",
            _vit_checkpointed,
            _IMAGE,
            10,
            64,
            16,
            default=False,
            attention=True,
        ),
        CaseSpec(
            "gpt",
            "GPT d 256, 4 layers, 16+8",
            GPT,
            (128,),
            1000,
            16,
            8,
            attention=True,
            tokens=True,
        ),
        CaseSpec("lstm", "LSTM 64-128, 40 steps, 32+16", LSTM, (40, 64), 10, 32, 16),
        *_SIXTEENTH,
        *map(_under_autocast, _SIXTEENTH),
        CaseSpec("tiny", "MLP 6-8-3, 20+4", _tiny, (6,), 3, 20, 4, default=False),
    )
}


def default_cases() -> list[str]:
    """The names of the cases that a benchmark runs when none is asked for."""
    return [name for name, spec in CASES.items() if spec.default]


def left_out(spec: CaseSpec, device: str) -> str | None:
    """Why a case tells nothing on a device, if so: bfloat16 is emulated there."""
    if not spec.bf16 or device.startswith("cuda"):
        return None
    found = torch.cpu.get_capabilities()
    if any(found.get(name) for name in _BF16_INSTRUCTIONS):
        return None
    return f"the processor has none of {', '.join(_BF16_INSTRUCTIONS)}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(spec: CaseSpec, count: int, seed: int) -> Tensor:
    shape = (count, *spec.input_shape)
    if spec.tokens:
        return torch.randint(spec.classes, shape, generator=_generator(seed))
    return torch.randn(shape, generator=_generator(seed))


def _labels(spec: CaseSpec, count: int, generator: torch.Generator) -> Tensor:
    shape = (count, *spec.input_shape) if spec.tokens else (count,)
    return torch.randint(spec.classes, shape, generator=generator)


def _call(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    out: Tensor = torch.func.functional_call(model, {**parameters, **buffers}, (x,))
    return out


def output_tangent(model: nn.Module, x: Tensor, clean: Batch) -> tuple[Tensor, Tensor]:
    """The outputs z of a batch and their derivative along the direction v, in float64.

    v is the gradient of the mean clean loss. Central differences: the labels of the training batch
    do not enter, so that scores of any number of label draws follow from one pair of forwards.
    """
    model = copy.deepcopy(model).double()
    parameters: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    inputs, targets = clean
    loss = example_losses(_call(model, parameters, _double(inputs)), targets).mean()
    direction = torch.autograd.grad(loss, list(parameters.values()))
    with torch.no_grad():
        norm = torch.stack([v.square().sum() for v in direction]).sum().sqrt()
        h = 1e-4 / norm
        moved = []
        for sign in (1, -1):
            shifted = {
                name: p + sign * h * v
                for (name, p), v in zip(parameters.items(), direction, strict=True)
            }
            moved.append(_call(model, shifted, _double(x)))
    return (moved[0] + moved[1]) / 2, (moved[0] - moved[1]) / (2 * h)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def draw_labels(
    spec: CaseSpec, model: nn.Module, x: Tensor, x_clean: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Labels of both batches with 45-55% positive scores, and that share ρ.

    Labels are drawn uniformly; then those of randomly chosen examples on the side that has too many
    are drawn again until ρ is within its range. The result depends on ``seed`` alone.

    Raises:
        RuntimeError: no such labels were found.
    """
    generator = torch.Generator().manual_seed(seed)
    y_clean = _labels(spec, x_clean.size(0), generator)
    y = _labels(spec, x.size(0), generator)
    z, dz = output_tangent(model, x, (x_clean, y_clean))
    for _ in range(200):
        positive = score_of_labels(z, dz, y) > 0
        rho = float(positive.double().mean())
        if RHO_RANGE[0] <= rho <= RHO_RANGE[1]:
            return y, y_clean, rho
        many = positive if rho > 0.5 else ~positive
        excess = int(many.sum()) - x.size(0) // 2
        candidates = many.nonzero().flatten()
        chosen = candidates[torch.randperm(candidates.numel(), generator=generator)[:excess]]
        y[chosen] = _labels(spec, x.size(0), generator)[chosen]
    raise RuntimeError(f"case {spec.name}: no label draw has 45-55% positive scores")


def score_of_labels(z: Tensor, dz: Tensor, y: Tensor) -> Tensor:
    """u_i = <∇f_i, v> from outputs z and their tangent dz, shape (n,)."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(example_losses(z, y).sum(), z)
    return (gradient * dz).flatten(1).sum(1)


Labels = tuple[Tensor, Tensor, float]


def _model_and_inputs(spec: CaseSpec) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.model().train()
    return model, _inputs(spec, spec.n, 1), _inputs(spec, spec.m, 2)


def draw_case_labels(spec: CaseSpec) -> Labels:
    """The labels of :func:`make_case`, for a process that must not draw them itself."""
    return draw_labels(spec, *_model_and_inputs(spec))


def make_case(spec: CaseSpec, labels: Labels | None = None) -> Case:
    """Build the model and draw data and, unless they are given, labels, all from fixed seeds."""
    model, x, x_clean = _model_and_inputs(spec)
    y, y_clean, rho = labels or draw_labels(spec, model, x, x_clean)
    return Case(spec, model, (x, y), (x_clean, y_clean), rho)
