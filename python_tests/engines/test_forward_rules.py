"""Under the forward engine the derivative of every operation is the one that its gradient has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from support.models import CLASSES, cross_entropy, model_of, vectors
from support.oracle import assert_exact, unchanged

# Of r, shape (n, 6): numbers of which about half stand near the kink of a ReLU.
OPERATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda r: r.amax(1, True),
    lambda r: r.max(1, True)[0],
    lambda r: torch.maximum(r, r.flip(1)),
    lambda r: r.median(1, True)[0],
    lambda r: r.sort(1)[0],
    lambda r: r.topk(2, 1)[0],
    lambda r: torch.clamp(r, 0, 0.2),
    lambda r: F.hardtanh(r, 0, 0.5),
    lambda r: F.relu6(r),
    lambda r: r.abs(),
    lambda r: r.norm(dim=1, keepdim=True),
    lambda r: r.prod(1, True),
    lambda r: r.cummax(1)[0],
    lambda r: r.logsumexp(1, True),
    lambda r: torch.fmax(r, r.flip(1)),
    lambda r: r.min(1, True)[0],
    lambda r: F.max_pool1d(r[:, None], 3, padding=1)[:, 0],
    lambda r: F.adaptive_max_pool1d(r[:, None], 2)[:, 0],
    lambda r: torch.aminmax(r, dim=1, keepdim=True).max,
    lambda r: F.threshold(r, 0, 0.0),
    lambda r: F.softshrink(r),
    lambda r: F.hardshrink(r),
    lambda r: F.hardsigmoid(r),
    lambda r: F.prelu(r, torch.tensor([0.1])),
    lambda r: F.leaky_relu(r),
    lambda r: F.elu(r),
    lambda r: F.celu(r),
    lambda r: F.selu(r),
    lambda r: F.softplus(r),
    lambda r: F.mish(r),
    lambda r: F.glu(r),
    lambda r: F.normalize(r),
    lambda r: F.cosine_similarity(r, r.flip(1))[:, None],
    lambda r: (r - r.mean(0)).std(1, keepdim=True),
    lambda r: r.var(0, keepdim=True).expand(len(r), -1),
    lambda r: torch.where(r > 0, r, r * 2),
    lambda r: r.clamp_min(0),
    lambda r: r.pow(2),
    lambda r: r.fmod(0.3),
    lambda r: r.remainder(0.3),
    lambda r: torch.atan2(r, r + 1),
    lambda r: torch.hypot(r, r + 1),
    lambda r: torch.lerp(r, r.flip(1), 0.3),
    lambda r: r.cumprod(1),
    lambda r: r.diff(dim=1),
    lambda r: r.roll(1, 0),
    lambda r: r.unfold(1, 2, 2).flatten(1),
    lambda r: torch.logaddexp(r, r.flip(1)),
    lambda r: r.view(-1, 2, 3).flip(1).reshape(-1, 6),
    lambda r: torch.linalg.norm(r, dim=1, keepdim=True),
    lambda r: torch.nan_to_num(r / r),
    lambda r: F.gelu(r),
    lambda r: F.gelu(r, approximate="tanh"),
    lambda r: F.silu(r),
    lambda r: F.logsigmoid(r),
    lambda r: F.softmin(r, 1),
    lambda r: F.tanhshrink(r),
    lambda r: F.softsign(r),
    lambda r: F.hardswish(r),
    lambda r: F.layer_norm(r, (6,)),
    lambda r: F.rms_norm(r, (6,)),
    lambda r: F.instance_norm(r.view(-1, 2, 3)).flatten(1),
    lambda r: F.local_response_norm(r.view(-1, 2, 3), 2).flatten(1),
    lambda r: F.pad(r, (1, 1)),
    lambda r: F.pad(r[:, None], (1, 1), mode="reflect")[:, 0],
    lambda r: F.pad(r[:, None], (1, 1), mode="circular")[:, 0],
    lambda r: F.interpolate(r[:, None], scale_factor=2, mode="linear")[:, 0],
    lambda r: F.avg_pool1d(r[:, None], 2)[:, 0],
    lambda r: F.lp_pool1d(r[:, None], 2, 2)[:, 0],
    lambda r: F.fold(F.unfold(r.view(-1, 1, 2, 3), 2), (2, 3), 2).flatten(1),
    lambda r: F.pixel_shuffle(r.view(-1, 6, 1, 1)[:, :4], 2).flatten(1),
    lambda r: torch.fft.fft(r).abs(),
    lambda r: torch.matrix_exp(0.1 * r[:, :4].view(-1, 2, 2)).flatten(1),
    lambda r: torch.linalg.inv(r[:, :4].view(-1, 2, 2) + 3 * torch.eye(2)).flatten(1),
    lambda r: torch.linalg.solve(r[:, :4].view(-1, 2, 2) + 3 * torch.eye(2), r[:, 4:]).flatten(1),
    lambda r: torch.linalg.svdvals(r[:, :4].view(-1, 2, 2) + torch.tensor([[3.0, 1], [0, 1]])),
    lambda r: torch.linalg.det(r[:, :4].view(-1, 2, 2) + 3 * torch.eye(2))[:, None],
    lambda r: r.gather(1, torch.tensor([[0, 1, 1]]).expand(len(r), 3)),
    lambda r: r.take_along_dim(r.argsort(1), 1),
    lambda r: r.index_select(1, torch.tensor([0, 0, 2])),
    lambda r: r[:, torch.tensor([0, 0, 2])],
    lambda r: r[r.sum(1).argsort()],
    lambda r: r.masked_fill(r > 0.5, 0),
    lambda r: r.tril(),
    lambda r: torch.tensordot(r, r.t(), 1),
    lambda r: torch.kron(r, r)[: len(r)],
    lambda r: torch.outer(r[:, 0], r[0]),
    lambda r: torch.cross(r[:, :3], r[:, 3:], dim=1),
    lambda r: torch.addmm(r, r @ r.t(), r),
    lambda r: torch.linalg.multi_dot([r, r.t(), r]),
    lambda r: torch.bmm(r[:, None], r[:, :, None])[:, 0],
    lambda r: F.bilinear(r, r, torch.ones(2, 6, 6)),
    lambda r: F.affine_grid(r.view(-1, 2, 3), (len(r), 1, 2, 2), align_corners=False).flatten(1),
    lambda r: torch.special.erf(r),
    lambda r: torch.lgamma(r + 1),
    lambda r: torch.digamma(r + 1),
    lambda r: torch.polygamma(1, r + 1),
    lambda r: torch.i0(r),
    lambda r: torch.sinc(r),
    lambda r: torch.expm1(r),
    lambda r: torch.nanmean(r, 1, keepdim=True),
    lambda r: torch.quantile(r, 0.4, dim=1, keepdim=True),
    lambda r: r.kthvalue(2, 1, keepdim=True)[0],
    lambda r: torch.trapezoid(r, dim=1)[:, None],
    lambda r: torch.gradient(r, dim=1)[0],
    lambda r: torch.cov(r)[: len(r)],
    lambda r: F.pairwise_distance(r, r.flip(1) + 1)[:, None],
    lambda r: torch.stack([r, r]).mean(0),
    lambda r: torch.cartesian_prod(r[0], r[1])[: len(r)],
    lambda r: torch.combinations(r[0])[: len(r)],
    lambda r: torch.block_diag(r, r)[: len(r)],
    lambda r: r.expand(2, *r.shape).sum(0),
    lambda r: r.repeat(1, 2),
    lambda r: r.repeat_interleave(2, 1),
    lambda r: torch.broadcast_tensors(r, r[:1])[1],
    lambda r: r.movedim(0, 1).contiguous().t(),
    lambda r: torch.swapaxes(r, 0, 1).t(),
    lambda r: r.as_strided((len(r), 2), (6, 1)),
    lambda r: torch.view_as_real(torch.complex(r, r)).flatten(1),
    lambda r: torch.angle(torch.complex(r, r + 1)),
    lambda r: F.huber_loss(r, r.flip(1), reduction="none"),
    lambda r: F.smooth_l1_loss(r, r.flip(1), reduction="none"),
    lambda r: F.mse_loss(r, r.flip(1), reduction="none"),
    lambda r: F.l1_loss(r, r.flip(1), reduction="none"),
    lambda r: F.binary_cross_entropy(torch.sigmoid(r), torch.sigmoid(r).flip(1), reduction="none"),
    lambda r: F.poisson_nll_loss(r, r.flip(1), reduction="none"),
    lambda r: F.gaussian_nll_loss(r, r.flip(1), r + 1, reduction="none"),
    lambda r: F.triplet_margin_loss(r, r.flip(1), r + 1, reduction="none")[:, None],
    lambda r: F.hinge_embedding_loss(r, torch.ones_like(r), reduction="none"),
    lambda r: F.margin_ranking_loss(r, r.flip(1), torch.ones_like(r), reduction="none"),
    lambda r: F.cosine_embedding_loss(r, r.flip(1), torch.ones(len(r)), reduction="none")[:, None],
    lambda r: F.nll_loss(r, torch.zeros(len(r)).long(), reduction="none")[:, None],
    lambda r: torch.copysign(r, r - 0.5),
    lambda r: torch.frac(r),
    lambda r: torch.trunc(r) + r,
    lambda r: r % 0.3,
    lambda r: r.sgn(),
    lambda r: r.cumsum(1),
    lambda r: r.__rsub__(1),
    lambda r: 1 / (1 + r),
    lambda r: 2**r,
    lambda r: r.addcmul(r, r),
    lambda r: r.addcdiv(r, r + 1),
    lambda r: torch.logcumsumexp(r, 1),
    lambda r: r.cummin(1)[0],
    lambda r: torch.fmin(r, r.flip(1)),
    lambda r: torch.minimum(r, r.flip(1)),
    lambda r: torch.nansum(r, 1, keepdim=True),
    lambda r: r.sum_to_size(1, 6).expand(len(r), 6),
    lambda r: torch.var_mean(r, 1, keepdim=True)[1],
    lambda r: torch.norm(r, p=3, dim=1, keepdim=True),
    lambda r: torch.linalg.vector_norm(r, ord=1, dim=1, keepdim=True),
    lambda r: torch.linalg.matrix_norm(r.view(-1, 2, 3))[:, None],
    lambda r: r.flatten(0).unflatten(0, (-1, 6)),
    lambda r: torch.nn.functional.one_hot(r.argmax(1), 6) * r,
    lambda r: torch.index_add(r, 1, torch.tensor([0, 0]), r[:, :2]),
    lambda r: torch.scatter_reduce(r, 1, torch.zeros(len(r), 6).long(), r, "amax"),
    lambda r: torch.select_scatter(r, r[:, 0], 1, 2),
    lambda r: torch.slice_scatter(r, r[:, :2], 1, 2, 4),
    lambda r: torch.diagonal_scatter(r[:3, :3] if len(r) > 3 else r[:, : len(r)], r[0, :3], 0)[
        :1
    ].expand(len(r), -1),
]


def _expression(operation: Callable[[Tensor], Tensor]) -> str:
    source = " ".join(inspect.getsource(operation).split())
    return source.partition("lambda r: ")[2].rstrip(", ")


def _model(operation: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        z = operation(torch.relu(model.a(x)) + 0.01 * model.b(x))
        return model.head(F.adaptive_avg_pool1d(z.reshape(len(z), 1, -1), 4)[:, 0])

    return model_of(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(4, CLASSES))


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS, ids=_expression)
def test_operation(operation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = _model(operation)
    batch = vectors(6)
    reweighter = Reweighter(model, cross_entropy, engine="forward")
    assert_exact(model, cross_entropy, batch, vectors(6), reweighter=reweighter)


# To the places (0, 0), (0, 1), (0, 1), ...: the second is written twice.
COLUMNS = torch.tensor([0, 1, 1, 2, 4, 5])
TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "index_put": lambda r: _zeros(r).index_put((torch.arange(len(r))[:, None], COLUMNS[None]), r),
    "index_put_": lambda r: _zeros(r).index_put_((torch.arange(len(r))[:, None], COLUMNS[None]), r),
    "scatter": lambda r: torch.scatter(_zeros(r), 1, COLUMNS.expand(len(r), 6), r),
    "scatter by name": lambda r: torch.scatter(
        input=_zeros(r), dim=1, index=COLUMNS.expand(len(r), 6), src=r
    ),
    "index_copy": lambda r: _zeros(r).index_copy_(1, COLUMNS, r),
    "index_fill": lambda r: _zeros(r).index_fill(1, COLUMNS, r[0, 0]),
    "put": lambda r: _zeros(r).put_(COLUMNS, r[0]),
    "assignment": lambda r: _assigned(_zeros(r), (slice(None), COLUMNS), r),
    "assignment of a list": lambda r: _assigned(_zeros(r), (slice(None), COLUMNS.tolist()), r),
}
ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "accumulated": lambda r: _zeros(r).index_put(
        (torch.arange(len(r))[:, None], COLUMNS[None]), r, accumulate=True
    ),
    "added": lambda r: _zeros(r).scatter_add(1, COLUMNS.expand(len(r), 6), r),
    "put accumulated": lambda r: _zeros(r).put(COLUMNS, r[0], accumulate=True) + r,
    "a permutation": lambda r: _zeros(r).scatter(1, torch.arange(6).flip(0).expand(len(r), 6), r),
    "a mask": lambda r: _assigned(_zeros(r), r > 0, r[r > 0]),
    "a slice": lambda r: _assigned(_zeros(r), (slice(1, 3), None, ..., 2), r[1:3, 0][:, None]),
    "constants": lambda r: _assigned(r * 1, (slice(None), COLUMNS[:3]), torch.ones(3)),
}


def _zeros(r: Tensor) -> Tensor:
    return torch.zeros(r.shape)


def _assigned(x: Tensor, index: Any, value: Tensor) -> Tensor:
    x[index] = value
    return x


@pytest.mark.parametrize("name", TWICE)
def test_place_that_is_written_twice_is_refused(name: str) -> None:
    """Autograd's gradient goes to both values."""
    model, batches = _model(TWICE[name]), (vectors(6), vectors(6))
    with unchanged(model), pytest.raises(NotExactError, match="one place twice"):
        Reweighter(model, cross_entropy, engine="forward").backward(*batches)
    step = assert_exact(model, cross_entropy, *batches, reweighter=Reweighter(model, cross_entropy))
    assert step.engine != "forward"


@pytest.mark.parametrize("name", ONCE)
def test_places_that_are_written_once(name: str) -> None:
    model = _model(ONCE[name])
    reweighter = Reweighter(model, cross_entropy, engine="forward")
    assert_exact(model, cross_entropy, vectors(6), vectors(6), reweighter=reweighter)


@pytest.mark.parametrize("layers", ["a", "head", "b"])
def test_directions_that_are_zero_for_some_parameters(layers: str) -> None:
    """What depends on the others alone moves nothing, and needs no tangent."""
    model = _model(lambda r: torch.tanh(r).cumsum(1))
    batch, clean = vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, engine="forward", layers=[layers])
    step = reweighter.backward(batch, clean)
    plain = Reweighter(model, cross_entropy, engine="layerwise", layers=[layers])
    expected = plain.weights(batch, clean)
    assert torch.allclose(step.weights, expected, rtol=1e-12, atol=1e-15)
