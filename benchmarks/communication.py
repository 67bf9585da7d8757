"""What a step sends: counted while it runs, and computed from shapes for models of any size.

A rank *sends* what the usual ring algorithms make it send. Of a sum over W ranks of N bytes that is
2 (W-1)/W N, and of gathering b bytes of each rank (W-1) b.

The direction gets to all ranks in one of three ways: the clean batches are *replicated* and nothing
is sent; the gradient of each layer is added up (*dense*); or the rows z' and g' of a layer's clean
examples are gathered (*factored*), from which every rank forms the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKS = (8, 64, 512)
WAYS = ("replicated", "dense", "factored", "the fewer of both")


def sent_by_all_reduce(size: float, ranks: int) -> float:
    """Bytes that a rank sends while a tensor of ``size`` bytes is added up over ranks."""
    return 2 * (ranks - 1) / ranks * size


def sent_by_all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends while ``size`` bytes of each rank are gathered by all."""
    return (ranks - 1) * size


def sent_by_broadcast(size: float, ranks: int) -> float:
    """Bytes that a rank sends, on average, while one rank's ``size`` bytes are given to all."""
    return (ranks - 1) / ranks * size


_KINDS: dict[str, tuple[str, int, Callable[[float, int], float]]] = {
    "allreduce_": ("all-reduce", 0, sent_by_all_reduce),
    "_allgather_base_": ("all-gather", 1, sent_by_all_gather),
    "broadcast_": ("broadcast", 0, sent_by_broadcast),
}
"""Torch's operators: how the page names them, which argument a rank hands over, what it sends."""

COLLECTIVES = tuple(kind for kind, *_ in _KINDS.values())
"""The kinds of collectives that a step uses."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside, those of DistributedDataParallel too."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.counts: dict[str, dict[str, float]] = {}
        """Calls, the bytes that this rank handed over, and those it sent, by kind."""
        self._ranks = ranks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count it if it is a collective.

        Raises:
            NotImplementedError: it is one of which it is not known what it sends.
        """
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _KINDS:
            raise NotImplementedError(f"it is not known what {name} sends")
        kind, argument, sent = _KINDS[name]
        tensors = [x for x in tree_leaves(args[argument]) if isinstance(x, Tensor)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        found = self.counts.setdefault(kind, {"calls": 0, "bytes": 0, "sent": 0.0})
        found["calls"] += 1
        found["bytes"] += size
        found["sent"] += sent(size, self._ranks)


@dataclass(frozen=True)
class Part:
    """Parameters of one layer, or those tied to them.

    ``rows`` is how many numbers of z' and g' one clean example has, as they enter the factored
    form; None where there is no such form, as for the scale of a norm.
    """

    parameters: int
    rows: int | None


def linear(inputs: int, outputs: int, positions: int, *, bias: bool = True) -> Part:
    """A linear layer that is applied at each position."""
    return Part(inputs * outputs + bias * outputs, positions * (inputs + outputs))


def convolution(
    inputs: int, outputs: int, kernel: int, before: int, after: int, *, bias: bool = False
) -> Part:
    """A convolution of square images of side ``before`` to ones of side ``after``.

    z' is sent as the image that it is, not as the patches that the kernel sees.
    """
    parameters = inputs * outputs * kernel**2 + bias * outputs
    return Part(parameters, inputs * before**2 + outputs * after**2)


def dense_only(parameters: int) -> Part:
    """Scales, shifts and positions, which are few."""
    return Part(parameters, None)


def tied(embedding: int, width: int, positions: int) -> Part:
    """An embedding that is the last layer's weight too, so that one gradient has two parts."""
    once = linear(width, embedding, positions, bias=False)
    assert once.rows is not None
    return Part(once.parameters, once.rows + positions * (1 + width))


def direction_bytes(parts: Iterable[Part], way: str, ranks: int, clean: int, number: int) -> float:
    """Bytes that a rank sends for the direction.

    Args:
        parts: of the model.
        way: one of :data:`WAYS`; what has no factored form is added up in each of the last three.
        ranks: how many there are.
        clean: clean examples of each rank.
        number: bytes of a number.
    """
    if way == "replicated":
        return 0.0
    total = 0.0
    for part in parts:
        dense = sent_by_all_reduce(part.parameters * number, ranks)
        rows = part.rows
        gathered = dense if rows is None else sent_by_all_gather(clean * rows * number, ranks)
        total += {"dense": dense, "factored": gathered}.get(way, min(dense, gathered))
    return total


def gradient_bytes(parts: Iterable[Part], ranks: int, number: int) -> float:
    """Bytes that a rank sends for the gradient, in plain training as in a reweighted step."""
    return sent_by_all_reduce(sum(part.parameters for part in parts) * number, ranks)


def resnet50() -> Iterator[Part]:
    """ResNet-50 on images of 224 x 224 with 1,000 classes."""
    yield convolution(3, 64, 7, 224, 112)
    yield dense_only(2 * 64)
    channels, side = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            after = side // stride if block == 0 else side
            yield convolution(channels, width, 1, side, side)
            yield convolution(width, width, 3, side, after)
            yield convolution(width, 4 * width, 1, after, after)
            yield dense_only(2 * (width + width + 4 * width))
            if block == 0:
                yield convolution(channels, 4 * width, 1, side, after)
                yield dense_only(2 * 4 * width)
            channels, side = 4 * width, after
    yield linear(2048, 1000, 1)


def gpt2() -> Iterator[Part]:
    """GPT-2 with 124 million parameters on sequences of 1,024 tokens."""
    positions, width = 1024, 768
    yield tied(50257, width, positions)
    yield dense_only(positions * width)
    for _ in range(12):
        yield dense_only(4 * width)
        yield linear(width, 3 * width, positions)
        yield linear(width, width, positions)
        yield linear(width, 4 * width, positions)
        yield linear(4 * width, width, positions)
    yield dense_only(2 * width)


def eight_billion() -> Iterator[Part]:
    """A decoder of the shape of Llama 3 8B on sequences of 8,192 tokens."""
    positions, width, hidden, vocabulary = 8192, 4096, 14336, 128256
    yield Part(vocabulary * width, positions * (1 + width))
    for _ in range(32):
        yield dense_only(2 * width)
        yield linear(width, width, positions, bias=False)
        yield linear(width, 1024, positions, bias=False)
        yield linear(width, 1024, positions, bias=False)
        yield linear(width, width, positions, bias=False)
        yield linear(width, hidden, positions, bias=False)
        yield linear(width, hidden, positions, bias=False)
        yield linear(hidden, width, positions, bias=False)
    yield dense_only(width)
    yield linear(width, vocabulary, positions, bias=False)


@dataclass(frozen=True)
class Model:
    """A model whose communication is computed: clean examples of a rank, bytes of a number."""

    title: str
    parts: Callable[[], Iterator[Part]]
    clean: int
    number: int


MODELS = (
    Model("ResNet-50, 8 clean images a GPU, float32", resnet50, 8, 4),
    Model("GPT-2 (124M), 1 clean sequence of 1,024 a GPU, float32", gpt2, 1, 4),
    Model("8B decoder, 1 clean sequence of 8,192 a GPU, bfloat16", eight_billion, 1, 2),
)


def communication_table() -> str:
    """Markdown: megabytes that a GPU sends in a step, for the gradient and for the direction."""
    lines = [
        "| model | GPUs | gradient | " + " | ".join(f"direction, {way}" for way in WAYS) + " |",
        "|---|" + "---|" * (2 + len(WAYS)),
    ]
    for model in MODELS:
        parts = list(model.parts())
        for ranks in RANKS:
            sent = [gradient_bytes(parts, ranks, model.number)]
            sent += [direction_bytes(parts, way, ranks, model.clean, model.number) for way in WAYS]
            cells = [model.title, str(ranks), *(f"{x / 1e6:,.0f}" for x in sent)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
