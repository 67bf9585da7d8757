"""Torch's fast path of transformers is that of the user's own forward, in every engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINE_OPTIONS, ENGINES, cross_entropy, model_of
from support.oracle import EXACT, assert_exact, unchanged

Batch = tuple[tuple[Tensor, Tensor], Tensor]
"""Sequences and padding mask, and classes."""

KINDS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
FORWARDS = [kind.forward for kind in KINDS]
REENTRANT = CheckpointFunction  # by its own name a step would not find it

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def _layer(kind: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer) -> Any:
    return kind(8, 2, 16, 0.1, batch_first=True)


def _encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(_layer(), 2)


def _batch(*lengths: int) -> Batch:
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    n = len(lengths)
    return (torch.randn(n, 6, 8, dtype=torch.float64), padding), torch.randint(CLASSES, (n,))


def _pooled(model: Any, x: Tensor, padding: Tensor) -> Tensor:
    """The mean over positions, so that what a padded position holds is seen."""
    hidden = model.body(x, src_key_padding_mask=padding)
    return model.head(hidden.mean(1))


def _attended(model: Any, x: Tensor, padding: Tensor) -> Tensor:
    hidden, shares = model.body(x, x, x, key_padding_mask=padding)
    return model.head((hidden + shares.sum(2, keepdim=True)).mean(1))


def _frozen(body: nn.Module, forward: Any = _pooled) -> nn.Module:
    return model_of(forward, body=body.eval().requires_grad_(False), head=nn.Linear(8, CLASSES))


def _under_no_grad(model: Any, x: Tensor, padding: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.body(model.first(x), src_key_padding_mask=padding)
    return model.head(hidden.mean(1) + model.first(x).mean(1))


def _trained_under_no_grad() -> nn.Module:
    """Its parameters require grad, but under ``no_grad`` torch does not ask them."""
    return model_of(
        _under_no_grad,
        body=_encoder().eval(),
        first=nn.Linear(8, 8),
        head=nn.Linear(8, CLASSES),
    )


MODELS = {
    "encoder": lambda: _frozen(_encoder()),
    "layer": lambda: _frozen(_layer()),
    "attention": lambda: _frozen(nn.MultiheadAttention(8, 2, batch_first=True), _attended),
    "no_grad": _trained_under_no_grad,
}


def _took_fast_path(model: nn.Module, batch: Batch) -> bool:
    """Whether a mode changes the result, which is how the paths of this model tell themselves."""

    class Looking(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    plain = model(*batch[0])
    with Looking():
        seen = model(*batch[0])
    return not torch.equal(plain, seen)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_users_forward(name: str, engine: Any) -> None:
    model, batch, clean = MODELS[name](), _batch(3, 2, 5, 4, 1), _batch(4, 2, 1)
    assert _took_fast_path(model, batch)
    losses = cross_entropy(model(*batch[0]), batch[1])
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    step = assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
    assert relative_error(step.losses, losses.detach()) < EXACT
    assert [kind.forward for kind in KINDS] == FORWARDS


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_longest_sequences_that_differ_at_a_later_step(engine: Any) -> None:
    """Of a merged batch, the nested tensor would keep the longest sequence of both."""
    model = _frozen(_encoder())
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for longest, clean_longest in ((5, 5), (5, 5), (3, 5), (6, 2), (5, 5)):
        batch, clean = _batch(longest, 2, 1, 1), _batch(clean_longest, 2, 1)
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_module_is_seen(engine: Any) -> None:
    model = model_of(_pooled, body=_encoder().eval(), head=nn.Linear(8, CLASSES))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    assert_exact(model, cross_entropy, _batch(3, 2, 5), _batch(4, 2), reweighter=reweighter)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mode_of_the_users_keeps_torch_off_the_path(engine: Any) -> None:
    model, batch, clean = _frozen(_encoder()), _batch(3, 2, 5), _batch(4, 2)
    with torch.device("cpu"):  # a function mode
        losses = cross_entropy(model(*batch[0]), batch[1])
        step = Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert relative_error(step.losses, losses.detach()) < EXACT


@pytest.mark.parametrize("engine", ENGINES)
def test_a_result_that_requires_grad_all_the_same_is_refused(engine: Any) -> None:
    scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    class Scaled(nn.TransformerEncoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * scale

    def forward(model: Any, x: Tensor, padding: Tensor) -> Tensor:
        return model.head(model.body(x).mean(1))

    model = _frozen(nn.TransformerEncoder(_layer(Scaled), 1), forward)
    model.scale = scale
    reweighter, batches = Reweighter(model, cross_entropy, engine=engine), (_batch(3), _batch(4))
    with pytest.raises(NotExactError, match="TransformerEncoder requires grad"), unchanged(model):
        reweighter.backward(*batches)


def test_a_custom_function_may_hide_what_runs_under_no_grad() -> None:
    """Its forward is a ``no_grad`` in which the layer-wise engine sees nothing of the module."""
    model = model_of(
        lambda s, x, padding: s.head(REENTRANT.apply(s.body, True, s.first(x)).mean(1)),
        first=nn.Linear(8, 8),
        body=_layer().eval(),
        head=nn.Linear(8, CLASSES),
    )
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    batches = _batch(3, 2, 5), _batch(4, 2)
    with pytest.raises(NotExactError, match="may hide that use"), unchanged(model):
        reweighter.backward(*batches)


def test_modes_of_other_threads_go_on() -> None:
    """A step replaces the forwards for the whole process, but only its own modes rest."""
    seen: list[str] = []

    class Listing(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    body = _encoder().double().eval().requires_grad_(False)

    def elsewhere() -> None:
        with Listing():
            body(torch.randn(2, 6, 8, dtype=torch.float64))

    def forward(model: Any, x: Tensor, padding: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return _pooled(model, x, padding)

    Reweighter(_frozen(_encoder(), forward), cross_entropy).backward(_batch(3, 2), _batch(4, 2))
    assert "multi_head_attention_forward" in seen
