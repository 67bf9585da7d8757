"""Operations that read or write where an index says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..call import Call, rule
from ..ids import MIXED, NONE, full, lowest, mixed, over, settle, squash


def _places(indices: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """The dimensions that a list of indices takes, with the index of each."""
    found, d = [], 0
    for i in indices:
        width = 1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim()
        found += [(d + k, i) for k in range(width) if i is not None]
        d += width
    return found


def _subscript(indices: Sequence[Tensor | None]) -> tuple[Tensor | slice, ...]:
    return tuple(slice(None) if i is None else i.cpu() for i in indices)


@rule("index_select gather")
def _selected(c: Call) -> Tensor:
    x, d, index, at = c["self"], c["dim"], c["index"].cpu(), c.of(c["index"])
    ids = c.steady(c.of(x), [d]) if c.chosen_by(c["index"]) else c.of(x)
    if c.name == "index_select":
        at = over(at, None, x.dim())
        return c.join(ids if ids.shape[d] == 1 else ids.index_select(d, index), at)
    if ids.shape[d] > 1:
        return squash(c.join(ids.expand(x.shape).gather(d, index), at))
    return c.join(ids[tuple(slice(k) for k in index.shape)], at)


@rule("index _unsafe_index")
def _indexed(c: Call) -> Tensor:
    x, taken, given = c["self"], _places(c["indices"]), [i for i in c["indices"] if i is not None]
    dims = [d for d, _ in taken]
    ids = c.steady(c.of(x), [d for d, i in taken if c.chosen_by(i)])
    ids = ids.expand([s if d in dims else ids.shape[d] for d, s in enumerate(x.shape)])
    ids = squash(ids[_subscript(c["indices"])])
    if all(i.dtype == torch.int64 for i in given) and dims == list(range(len(taken))):
        at = c.all(*map(c.of, given))  # row by row, where the index comes first
        at = at.reshape(at.shape + (1,) * (c.outs[0].dim() - at.dim()))
    else:
        at = c.all(*(over(c.of(i), None, 0) for i in given))
    return c.join(ids, at)


@rule("masked_select")
def _masked_select(c: Call) -> Tensor:
    ids = c.steady(c.of(c["self"]), range(c["self"].dim()))
    ids = ids.expand(torch.broadcast_shapes(c["self"].shape, c["mask"].shape))
    return squash(c.join(ids.masked_select(c["mask"].cpu()), over(c.of(c["mask"]), None, 1)))


@rule("embedding")
def _embedding(c: Call) -> Tensor:
    return c.join(c.of(c["indices"]).unsqueeze(-1), over(c.of(c["weight"]), None, 0))


@rule("_embedding_bag _embedding_bag_forward_only")
def _bags(c: Call) -> list[Tensor]:
    weights = c.of(c["per_sample_weights"], 1)
    ids = c.all(c.of(c["indices"]), weights, over(c.of(c["weight"]), None, 1))
    if ids.shape[0] > 1:
        count, length = c.outs[0].shape[0], c["indices"].shape[0]
        ids = c.steady(ids, [0] if c.chosen_by(c["offsets"]) else []).expand(length)
        places = torch.arange(length, device="cpu")
        bag = torch.searchsorted(c["offsets"].cpu(), places, right=True).clamp(1, count) - 1
        ids = _collected(full(1).expand(count), full(1, MIXED).expand(count), bag, ids)
    ids = c.join(ids, over(c.of(c["offsets"]), [0]))
    return [ids.unsqueeze(1), *(over(ids, None, x.dim()) for x in c.outs[1:])]


def _collected(high: Tensor, low: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """Ids of what ``new`` is added to, at the places ``at``, and of what was there."""
    high = high.scatter_reduce(0, at, new, "amax")
    return settle(high, low.scatter_reduce(0, at, lowest(new), "amin"))


def _put(
    c: Call,
    get: Callable[[Tensor], Tensor],
    new: Tensor,
    last: int,
    asked: Iterable[int],
    *,
    replace: bool,
) -> Tensor:
    """Ids of ``self`` after ``new`` was written to the places that ``get`` reads.

    ``last`` is the last dimension in which ``get`` takes a part; an index chooses places along the
    dimensions ``asked``.
    """
    x, old, sizes = c["self"], c.of(c["self"]), list(c["self"].shape)
    for d in range(last + 1, x.dim()):
        if old.shape[d] == 1 and (x.dim() - d > new.dim() or new.shape[d - x.dim()] == 1):
            sizes[d] = 1
    at = get(torch.arange(math.prod(sizes), device="cpu").view(sizes))
    new, at, old = new.expand(at.shape).reshape(-1), at.reshape(-1), old.expand(sizes).reshape(-1)
    if replace:
        old = old.scatter(0, at, NONE)
    ids = _collected(old, lowest(old), at, new)
    return c.steady(squash(ids.view(sizes)), asked)


@rule("scatter scatter_add scatter_reduce index_add index_copy index_fill")
def _written(c: Call) -> Tensor:
    x, index, at = c["self"], c["index"].cpu(), c.of(c["index"])
    d = c["dim"] % max(x.dim(), 1)
    source = next((c[k] for k in ("src", "source", "value") if isinstance(c[k], Tensor)), None)
    element, old, new = c.name.startswith("scatter"), c.of(x), c.of(source, x.dim())
    at = over(at, [d]) if element else over(at, None, x.dim())
    shape = torch.broadcast_shapes(new.shape, at.shape)
    fits = all(s in (1, k) for s, k in zip(shape, x.shape, strict=False))
    if old.shape[d] == new.shape[d] == 1 and fits and not mixed(old):
        return c.all(old, new, at)  # alike along d, wherever the index points
    if element:
        new = new[tuple(slice(k) for k in index.shape)]
    ids = _put(
        c,
        (lambda t: t.gather(d, index)) if element else (lambda t: t.index_select(d, index)),
        new,
        x.dim() - 1 if element else d,
        [d] if c.chosen_by(c["index"]) else [],
        replace=c.name in ("scatter", "scatter_", "index_copy"),
    )
    return c.join(ids, at if fits else over(at, None, x.dim()))


@rule("index_put _index_put_impl_ _unsafe_index_put")
def _written_at(c: Call) -> Tensor:
    taken, subscript = _places(c["indices"]), _subscript(c["indices"])
    asked = [d for d, i in taken if c.chosen_by(i)]
    last = max(d for d, _ in taken)
    ids = _put(
        c, lambda t: t[subscript], c.of(c["values"]), last, asked, replace=not c["accumulate"]
    )
    return c.all(ids, *(over(c.of(i), None, 0) for i in c["indices"] if i is not None))


@rule("slice_scatter", get="slice", rest="dim start end step")
@rule("select_scatter", get="select", rest="dim index")
def _written_view(c: Call, get: str, rest: str) -> Tensor:
    part, where = getattr(torch.ops.aten, get), [c[name] for name in rest.split()]
    last = c["self"].dim() - 1
    return _put(c, lambda t: part(t, *where), c.of(c["src"]), last, [], replace=True)
