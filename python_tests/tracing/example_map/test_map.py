"""What enters a map, what it is told, and what it says to its user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l2rw_ext.tracing.example_map import MIXED, NONE, ExampleMap, Exits, Verdict, judge

N, D = 4, 3


def _map(layer: nn.Module, count: int = N, **options: Any) -> ExampleMap:
    return ExampleMap(count, [*layer.named_parameters(), *layer.named_buffers()], **options)


def _verdict(
    forward: Callable[[nn.Linear, Tensor], Tensor], x: Tensor | None = None, **options: Any
) -> Verdict:
    layer, x = nn.Linear(D, D), torch.randn(N, D) if x is None else x
    example_map = _map(layer)
    example_map.enter(x)
    with example_map, Exits(example_map):
        losses = forward(layer, x)
    assert not example_map.failures
    return judge(example_map, [losses], **options)


def test_data_enters_along_the_first_dimension_of_its_size() -> None:
    example_map, x = ExampleMap(N, []), torch.randn(2, N, N)
    example_map.enter(x)
    assert example_map.values(x).tolist() == [[[0], [1], [2], [3]]]
    example_map.enter(x, dimension=-1)
    assert example_map.labels(x).tolist() == [[[0, 1, 2, 3]]]
    assert (example_map.values(x).dtype, example_map.values(x).shape) == (torch.int32, (1, 1, N))


def test_parts_of_a_merged_batch() -> None:
    n, m, layer = 3, 2, nn.Linear(D, D)
    example_map, x, y, y_clean = _map(layer, n + m), *map(torch.randn, (n + m, n, m), (D, D, D))
    example_map.enter(x)
    example_map.enter(y, first=0, size=n)
    example_map.enter(y_clean, first=n, size=m)
    with example_map, Exits(example_map):
        out = layer(x)
        parts = [((out[:n] - y) ** 2).sum(1), ((out[n:] - y_clean) ** 2).sum(1)]
        crossed = [parts[0] + out[n:].sum(), parts[1]]
        shown = [parts[0] + out[n:].detach().sum(), parts[1]]
    assert (judge(example_map, parts).certain, judge(example_map, parts).apart) == (True, True)
    assert judge(example_map, crossed).kind == "mixed"
    verdict = judge(example_map, shown)
    assert (verdict.kind, verdict.apart) == ("certain", False)
    assert judge(example_map, parts[::-1]).kind == "mixed"
    assert judge(example_map, parts[:1]).reason == "there is not one loss for each example"


class _Linear(torch.autograd.Function):
    """As a use of this package: the weight is no differentiable argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        ctx.weight = weight
        return x.reshape(-1, D) @ weight.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g @ ctx.weight.t(), None, None


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda x: x - x.mean(0), "mixed"),
        (lambda x: torch.tanh(x) / x.detach().std(0), "certain"),
        (lambda x: x.roll(1, 0), "mixed"),
    ],
)
def test_labels_start_in_a_function_of_ours(
    between: Callable[[Tensor], Tensor], expected: str, ours: bool
) -> None:
    layer, x, token = nn.Linear(D, D), torch.randn(N, D), torch.zeros((), requires_grad=True)
    example_map = _map(layer)
    example_map.enter(x)
    outs = []
    with example_map, Exits(example_map):
        h = x - x.mean(0)
        for rows in (lambda x: x, between):
            h = rows(h)
            with example_map.use(h):
                h = _Linear.apply(h, layer.weight, token)
            outs.append(example_map.labels(h))
        losses = h.sum(1)
    assert [ids.flatten().tolist() for ids in outs[:1]] == [[0, 1, 2, 3]]
    verdict = judge(example_map, [losses], ours=lambda node: ours)
    assert verdict.kind == (expected if ours or expected != "certain" else "today")
    if verdict.kind == "today":
        assert verdict.reason.startswith("the custom autograd function _Linear may do anything")


def test_rows_of_tensors_made_without_data() -> None:
    cell, x = nn.GRUCell(D, D), torch.randn(N, D)
    for by_row, expected in ((False, NONE), (True, 0)):
        example_map = _map(cell, by_row=by_row)
        example_map.enter(x)
        with example_map:
            h = torch.zeros(N, D)
            met = F.linear(h, cell.weight_hh)
            losses = cell(x, h).sum(1)
        assert int(example_map.labels(met)[0, 0]) == expected
        assert judge(example_map, [losses]).certain


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda f, x: f(x - x.mean(0)).sum(1), "each loss keeps to the rows of its example"),
        (lambda f, x: (f(x) - f(x).mean(0)).sum(1), "mean (test_map.py:"),
        (lambda f, x: f(x[x[:, 0].argsort()]).sum(1), "each loss keeps to the rows of its example"),
        (lambda f, x: f(x[x[:, 0].topk(N)[1][:1]] + x[:1]), "before the first layer, an index"),
        (lambda f, x: f(x).sum(1) * (2 if x.max() > 9 else 1), "reads values of the data by"),
        (lambda f, x: f(x).sum(1) * x.unique().numel(), "reads values of the data by _unique2"),
        (lambda f, x: f(x).sum(1) * float(x.numpy().max()), "numpy (test_map.py:"),
        (lambda f, x: _with_data(f(x), x).sum(1), "data (test_map.py:"),
        (lambda f, x: torch.sparse.mm(torch.eye(N).to_sparse(), f(x)).sum(1), "no rule says which"),
        (lambda f, x: f(x).sum(1).flip(0), "in the order of the examples"),
        (lambda f, x: f(x).sum(1, keepdim=True), "not one loss for each example"),
    ],
)
def test_reasons_name_operation_and_line(
    forward: Callable[[nn.Linear, Tensor], Tensor], reason: str
) -> None:
    assert reason in _verdict(forward).reason


def _with_data(h: Tensor, x: Tensor) -> Tensor:
    """Values of x with the graph of h - h.mean(0), which a map that trusts values misses."""
    h = h - h.mean(0)
    h.data = torch.tanh(x)
    return torch.tanh(h)


def _into_complex(f: nn.Linear, x: Tensor) -> Tensor:
    """A write through a view of another element size."""
    h = f(x)
    pairs = torch.zeros(N, D, 2)
    pairs[:, :, 0] = h
    torch.view_as_complex(pairs)[0] = torch.complex(h[1], h[1])
    return pairs.sum((1, 2))


def _into_ints(f: nn.Linear, x: Tensor) -> Tensor:
    h = f(x)
    scale = torch.zeros(N, D)
    scale.view(torch.int32)[2:].copy_(h.detach()[:2].view(torch.int32))
    return (h * scale).sum(1)


def _grown(f: nn.Linear, x: Tensor) -> Tensor:
    return (f(x) * torch.ones(2, D).resize_(N, D)).sum(1)


def _lists(f: nn.Linear, x: Tensor) -> Tensor:
    h, sums = f(x), [torch.zeros(D) for _ in range(N)]
    torch._foreach_add_(sums, [h.detach().mean(0)] * N)
    return (h * torch.stack(sums)).sum(1)


def _out(f: nn.Linear, x: Tensor) -> Tensor:
    h = f(x)
    return (h * torch.mean(h.detach(), 0, out=torch.zeros(D))).sum(1)


@pytest.mark.parametrize("forward", [_into_ints, _grown, _lists, _out])
def test_values_of_others_that_come_by_a_write(
    forward: Callable[[nn.Linear, Tensor], Tensor],
) -> None:
    verdict = _verdict(forward)
    assert (verdict.kind, verdict.apart) == ("certain", False)


def test_gradients_of_others_that_come_by_a_write() -> None:
    assert _verdict(_into_complex).kind == "mixed"


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.randn(N, 1).expand(N, D), "certain"),
        (torch.randn(1, D).expand(N, D), "mixed"),
        (torch.randn(N + D - 1).unfold(0, D, 1), "mixed"),
    ],
)
def test_inputs_that_share_memory(x: Tensor, kind: str) -> None:
    assert _verdict(lambda f, x: f(x).sum(1), x).kind == kind


@pytest.mark.filterwarnings("ignore")
def test_contexts_of_a_forward() -> None:
    def forward(f: nn.Linear, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: torch.tanh(f(x)), x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
            return f(h).float().sum(1)

    assert _verdict(forward).certain


def test_operators_that_take_functions() -> None:
    def forward(f: nn.Linear, x: Tensor) -> Tensor:
        h = f(x)
        chosen = torch.cond(torch.tensor(True), lambda y: y * 1, lambda y: y * 2, (h.detach(),))
        return h.sum(1) + 0 * chosen.sum(1)

    with torch.compiler.set_stance("force_eager"):
        verdict = _verdict(forward)
    assert "cond" in verdict.notes["unknown"]
    assert (verdict.kind, verdict.apart) == ("certain", False)


def test_what_is_done_aside_leaves_no_note() -> None:
    example_map, x = ExampleMap(N, []), torch.randn(N)
    example_map.enter(x)
    with example_map, Exits(example_map):
        with example_map.aside():
            assert bool((x == x).all())
        assert not example_map.notes
        assert bool(x.isfinite().all())
    assert list(example_map.notes) == ["mixes values", "reads"]


def test_memory_that_nobody_has_written_may_be_anyones() -> None:
    example_map = ExampleMap(N, [])
    with example_map:
        x = torch.empty(N, D)
        x[0] = 1
    assert example_map.values(x)[:, 0].tolist() == [NONE, MIXED, MIXED, MIXED]
