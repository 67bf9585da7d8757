"""The interception sees the uses of parameters, and notices where it has not seen one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.tracing.coverage import check_graph
from l2rw_ext.tracing.interception import Interception
from l2rw_ext.tracing.members import Members
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_exact, unchanged


def _sequences(n: int) -> Any:
    return torch.randn(n, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


class _Double(torch.autograd.Function):
    """2 w, through a custom Function that takes the parameter itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


# name -> (model, the parameter and the operation that the message names, batches)
UNRULED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], Any]]] = {
    "distance to prototypes": (
        lambda: model_of(
            lambda s, x: F.cosine_similarity(x.unsqueeze(1), s.w, dim=-1), w=torch.randn(CLASSES, 5)
        ),
        "'w' goes into cosine_similarity",
        vectors,
    ),
    "einsum over a diagonal": (
        lambda: model_of(lambda s, x: torch.einsum("nd,cdd->nc", x, s.w), w=torch.randn(3, 5, 5)),
        "'w' goes into einsum",
        vectors,
    ),
    "lstm with projected states": (
        lambda: model_of(
            lambda s, x: s.head(s.recurrent(x)[0][:, -1]),
            recurrent=nn.LSTM(5, 4, batch_first=True, proj_size=2),
            head=nn.Linear(2, CLASSES),
        ),
        "goes into lstm",
        _sequences,
    ),
    "packed sequence": (
        lambda: model_of(
            lambda s, x: s.head(s.recurrent(_packed(x))[1][0]),
            recurrent=nn.GRU(5, 4),
            head=nn.Linear(4, CLASSES),
        ),
        "goes into gru of a packed sequence",
        _sequences,
    ),
    "complex filter": (
        lambda: model_of(
            lambda s, x: s.head(
                torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(s.filter), n=5)
            ),
            filter=torch.randn(3, 2),
            head=nn.Linear(5, CLASSES),
        ),
        "'filter' goes into mul",
        vectors,
    ),
    "out of sight in a scripted module": (
        lambda: nn.Sequential(
            torch.jit.script(nn.Linear(5, 6).double()), nn.Tanh(), nn.Linear(6, CLASSES).double()
        ),
        "'0.weight' is used where no torch function is seen",
        vectors,
    ),
    "out of sight in a traced module": (
        lambda: nn.Sequential(
            torch.jit.trace(nn.Linear(5, 6).double(), vectors(2)[0]),
            nn.Tanh(),
            nn.Linear(6, CLASSES).double(),
        ),
        "'0.weight' is used where no torch function is seen",
        vectors,
    ),
    "custom function of the parameter": (
        lambda: model_of(lambda s, x: _Double.apply(x, s.w), w=torch.randn(CLASSES, 5)),
        "'w' goes into matmul",
        vectors,
    ),
    "torch.func transform": (
        lambda: model_of(lambda s, x: torch.vmap(s.head)(x), head=nn.Linear(5, CLASSES)),
        "inside a torch.func transform",
        vectors,
    ),
    "data written into a derived weight": (
        lambda: model_of(_writes_a_layer_into_a_weight, inner=nn.Linear(5, 5), w=torch.randn(3, 5)),
        "parameter 'w'",
        vectors,
    ),
    "derived weight scaled in place by the input": (
        lambda: model_of(_scales_a_weight_in_place, w=torch.randn(CLASSES, 5)),
        "'w' goes into mul_",
        vectors,
    ),
    "derived parameter that is changed in place after its use": (
        lambda: model_of(_changes_a_parameter, w=torch.randn(5), head=nn.Linear(5, CLASSES)),
        "changed in place after add",
        vectors,
    ),
    "differentiable gradient inside the forward": (
        lambda: model_of(_follows_its_gradient, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES)),
        "create_graph=True",
        vectors,
    ),
}

# Those that the forward engine cannot carry tangents through either.
NO_TANGENT = (
    "out of sight in a scripted module",
    "out of sight in a traced module",
    "custom function of the parameter",
    "torch.func transform",
    "differentiable gradient inside the forward",
)


def _packed(x: Tensor) -> Any:
    lengths = x[:, 0, 0].sigmoid().mul(3).long().add(1).clamp(max=3)
    return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def _writes_a_layer_into_a_weight(model: Any, x: Tensor) -> Tensor:
    w = model.w * 1
    w[0] = model.inner(x).mean(0)
    return F.linear(x, w)


def _changes_a_parameter(model: Any, x: Tensor) -> Tensor:
    w = model.w * 1
    x = x + w
    w.mul_(2)
    return model.head(x)


def _scales_a_weight_in_place(model: Any, x: Tensor) -> Tensor:
    w = model.w * 1
    w.mul_(x.detach().abs().max())
    return F.linear(x, w)


def _follows_its_gradient(model: Any, x: Tensor) -> Tensor:
    z = torch.tanh(model.a(x))
    (g,) = torch.autograd.grad(model.b(z).sum(), z, create_graph=True)
    return model.b(z - 0.1 * g)


@pytest.mark.parametrize("name", UNRULED)
def test_what_no_rule_covers_is_named_and_goes_to_another_engine(name: str) -> None:
    make, message, batch_of = UNRULED[name]
    model = make()
    batch, clean = batch_of(6), batch_of(4)
    with pytest.raises(NotExactError, match=message), unchanged(model):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    reweighter = Reweighter(model, cross_entropy)
    explanation = reweighter.explain(batch, clean)
    engine = "double_backward" if name in NO_TANGENT else "forward"
    assert explanation.engine == engine
    assert re.search(message, explanation.reason)
    assert re.search(message, str(explanation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_exact(
                model,
                cross_entropy,
                batch,
                clean,
                reweighter=reweighter,
                engine=engine,
                copied="sight" not in name,
            )
    warned = sum("double_backward" in str(w.message) for w in caught)
    assert warned == (1 if engine == "double_backward" else 0)


KEYWORDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "torch's names": (
        lambda s, x: torch.cat(
            tensors=[F.linear(input=x, weight=s.w, bias=s.b), s.b.expand(x.shape[0], -1)], dim=1
        ),
        "layerwise",
    ),
    "NumPy's names": (lambda s, x: F.linear(x=x, weight=s.w, bias=s.b), "forward"),
    "addmm by name": (lambda s, x: torch.addmm(s.b, x, mat2=s.w.t()), "forward"),
    "addmm with beta": (lambda s, x: torch.addmm(s.b, x, s.w.t(), beta=2), "layerwise"),
    "a factor by name": (lambda s, x: torch.matmul(x, other=s.w.t()) + s.b, "forward"),
    "NumPy's name of an activation": (
        lambda s, x: torch.relu(x=F.batch_norm(F.linear(x, s.w), None, None, training=True)),
        "double_backward",
    ),
}
"""Calls by name, and the first engine that knows the names."""


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_arguments_by_name(name: str) -> None:
    """A name that no layer and no rule knows goes to an engine that is exact all the same."""
    function, engine = KEYWORDS[name]
    model = model_of(function, w=torch.randn(CLASSES, 5), b=torch.randn(CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine=engine)


@pytest.mark.parametrize("engine", ["layerwise", "forward"])
def test_argument_that_torch_refuses_is_torchs_error(engine: Any) -> None:
    model = model_of(lambda s, x: F.linear(x, s.w, scale=2), w=torch.randn(CLASSES, 5))
    with pytest.raises(TypeError, match=r"linear\(\) got an unexpected keyword argument 'scale'"):
        Reweighter(model, cross_entropy, engine=engine).backward(vectors(6), vectors(4))


def test_table_that_is_written_after_the_look_up() -> None:
    """As in torch, what was looked up needs the table no more."""

    def forward(s: Any, index: Tensor) -> Tensor:
        rows = F.embedding(index, s.table)
        with torch.no_grad():
            s.table.mul_(1)
        return s.head(rows.sum(1))

    model = model_of(forward, table=torch.randn(7, 5), head=nn.Linear(5, CLASSES))

    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(7, (n, 3)), torch.randint(CLASSES, (n,))

    assert_exact(model, cross_entropy, batch(6), batch(4), engine="layerwise")


def test_leaf_made_inside_the_forward_is_an_input() -> None:
    model = model_of(
        lambda s, x: s.head(x.detach().requires_grad_() * 2), head=nn.Linear(5, CLASSES)
    )
    for engine in ENGINES:
        reweighter = Reweighter(model, cross_entropy, engine=engine)
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


def test_teacher_under_no_grad_is_data() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = model.a(x)
        return model.b(torch.tanh(model.a(x)) + teacher)

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_layer_filled_into_a_buffer_of_zeros_is_data() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        held = torch.zeros(len(x), 6, dtype=x.dtype)
        held[:, 1:5] = model.a(x)
        return model.b(held)

    model = model_of(forward, a=nn.Linear(5, 4), b=nn.Linear(6, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_parameter_filled_into_a_buffer_of_zeros_is_trained() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        w = torch.zeros(CLASSES, 5, dtype=x.dtype)
        w[:, ::2] = model.columns
        return F.linear(x, w)

    model = model_of(forward, columns=torch.randn(CLASSES, 3))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_tensors_in_a_list_that_is_given_by_name_are_seen() -> None:
    model = model_of(
        lambda s, x: torch.stack(tensors=[s.a(x), s.b(x)]).sum(0) * x[:, :CLASSES],
        a=nn.Linear(5, CLASSES),
        b=nn.Linear(5, CLASSES),
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
    assert_exact(model, cross_entropy, vectors(1), vectors(1), engine="layerwise")


def _recurrent(model: Any, x: Tensor) -> Tensor:
    h = (
        torch.zeros(len(x), 4, dtype=x.dtype)
        if model.first is None
        else model.first.expand(len(x), 4)
    )
    for step in x.unbind(1):
        h = torch.tanh(model.inner(step) + model.hidden(h))
    return model.head(h)


def _typed_tokens(model: Any, x: Tensor) -> Tensor:
    kinds = torch.zeros(x.shape[:2], dtype=torch.long)
    kinds[:, 1:] = 1
    position = model.position(torch.arange(x.shape[1]).expand(x.shape[:2]))
    return model.head(torch.tanh(model.inner(x) + model.kind(kinds) + position).mean(1))


def _queried(model: Any, x: Tensor) -> Tensor:
    queries = model.queries.expand(len(x), -1, -1)
    seen, _ = model.attention(queries + model.query(queries), x, x)
    return model.head(seen.mean(1))


ROWS_WITHOUT_DATA: dict[str, Callable[[], nn.Module]] = {
    "first hidden state of zeros": lambda: model_of(
        _recurrent, first=None, inner=nn.Linear(5, 4), hidden=nn.Linear(4, 4), head=nn.Linear(4, 3)
    ),
    "first hidden state that is learnt": lambda: model_of(
        _recurrent,
        first=torch.randn(4),
        inner=nn.Linear(5, 4),
        hidden=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    ),
    "token types and positions": lambda: model_of(
        _typed_tokens,
        inner=nn.Linear(5, 4),
        kind=nn.Embedding(2, 4),
        position=nn.Embedding(9, 4),
        head=nn.Linear(4, 3),
    ),
    "learnt queries": lambda: model_of(
        _queried,
        queries=torch.randn(1, 2, 4),
        query=nn.Linear(4, 4),
        attention=nn.MultiheadAttention(4, 2, kdim=5, vdim=5, batch_first=True),
        head=nn.Linear(4, 3),
    ),
}


@pytest.mark.parametrize("name", ROWS_WITHOUT_DATA)
@pytest.mark.parametrize(("n", "m"), [(6, 4), (1, 1), (3, 3)])
@pytest.mark.parametrize("same_shape", [True, False])
def test_rows_that_are_made_without_data(name: str, n: int, m: int, same_shape: bool) -> None:
    model = ROWS_WITHOUT_DATA[name]()
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        batch, (clean_x, clean_y) = _sequences(n), _sequences(m)
        clean = (clean_x if same_shape else clean_x[:, :2]), clean_y
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter, engine="layerwise")


def test_activation_by_a_custom_function() -> None:
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clamp(-0.5, 0.5)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    model = model_of(
        lambda s, x: s.b(Clip.apply(s.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES)
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_in_place_activations() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.a(x)
        h.mul_(2).add_(model.shift)
        h[:, 0] = 1.0
        h = F.relu_(h)
        return model.b(h)

    model = model_of(forward, a=nn.Linear(5, 6), shift=torch.randn(6), b=nn.Linear(6, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_layer_input_that_is_changed_in_place_is_the_version_error_of_autograd() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = torch.sigmoid(model.a(x))
        out = model.b(h)
        h.mul_(2)
        return out

    model = model_of(forward, a=nn.Linear(5, 6), b=nn.Linear(6, CLASSES))
    batches = vectors(6), vectors(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), unchanged(model):
        Reweighter(model, cross_entropy).backward(*batches)


def test_max_norm_of_an_embedding_goes_to_another_engine() -> None:
    model = model_of(
        lambda s, i: s.head(s.embedding(i).mean(1)),
        embedding=nn.Embedding(7, 5, max_norm=1.0),
        head=nn.Linear(5, CLASSES),
    )
    batch = torch.randint(7, (4, 3)), torch.randint(CLASSES, (4,))
    with pytest.raises(NotExactError, match=r"'embedding.weight' goes into embedding"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, batch)


def test_gradient_scaling_hook_on_an_activation() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.a(x)
        h.register_hook(lambda g: 0.3 * g)
        return model.b(torch.tanh(h))

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_clipping_hook_on_an_activation_couples() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.a(x)
        h.register_hook(lambda g: g / g.norm())
        return model.b(torch.tanh(h))

    model = model_of(forward, a=nn.Linear(5, 5), b=nn.Linear(5, CLASSES))
    with pytest.raises(NotExactError, match="mixes examples"):
        Reweighter(model, cross_entropy, engine="layerwise").backward(vectors(6), vectors(4))


def test_module_hooks() -> None:
    model = mlp()
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model[0].register_forward_hook(lambda m, a, out: out + 1)
    model[2].register_full_backward_hook(lambda m, g, h: calls.append("backward"))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
    assert calls


def test_every_use_is_recorded_once_and_reached() -> None:
    model = mlp()
    x, y = vectors(3)
    with Interception(Members.of(model), model) as interception:
        loss = cross_entropy(model(x), y).sum()
    assert [use.operation for use in interception.uses] == ["linear", "linear"]
    reached, nodes = check_graph(interception, [loss])
    assert reached == [{0, 1}]
    assert len(set(nodes)) > 4
    assert torch._C._len_torch_function_stack() == 0


def test_constants_and_roots_are_told_apart() -> None:
    model = model_of(lambda s, x: x, w=torch.randn(3, 5))
    model.register_buffer("mask", torch.ones(3, 5))
    x, _ = vectors(2)
    with Interception(Members.of(model), model) as interception:
        derived = (model.w * model.mask).t()
        constant = torch.arange(3) * 2
        mixed = x * model.mask[0]
    assert interception.is_root(model.w)
    assert interception.is_root(derived)
    assert not interception.is_data(derived)
    assert not interception.is_data(constant)
    assert interception.is_data(x)
    assert interception.is_data(mixed)


def _writes(change: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    def forward(model: Any, x: Tensor) -> Tensor:
        token = model.token.repeat(x.shape[0], 1)
        change(token, x)
        return model.head(torch.tanh(x + token))

    return forward


@pytest.mark.parametrize(
    "change",
    [
        lambda token, x: token.mul_(2),
        lambda token, x: F.relu(token, inplace=True),
        lambda token, x: token[:, 1].fill_(0.5),
        lambda token, x: token.view(-1)[2:9].zero_(),
        lambda token, x: token[:, 1].copy_(x[:, 0]),
    ],
    ids=["scaled", "activated", "column", "flat", "data"],
)
def test_a_repeated_parameter_that_is_written_to(change: Callable[[Tensor, Tensor], Any]) -> None:
    """It repeats the parameter no longer."""
    model = model_of(_writes(change), token=torch.randn(5), head=nn.Linear(5, CLASSES))
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")


def test_a_copy_of_an_expanded_parameter() -> None:
    """As a learned initial state is often made."""

    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.h.expand(-1, x.shape[0], -1).contiguous()
        c = model.c.expand(-1, x.shape[0], -1).clone()
        out, (_, memory) = model.lstm(x.unflatten(1, (5, 1)), (h, c))
        return model.head(out[:, -1] + memory[0])

    model = model_of(
        forward,
        h=torch.randn(1, 1, 6),
        c=torch.randn(1, 1, 6),
        lstm=nn.LSTM(1, 6, batch_first=True),
        head=nn.Linear(6, CLASSES),
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
