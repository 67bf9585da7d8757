"""Inputs of every form that models take: each reaches the model, and every engine is exact."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from l2rw_ext import Reweighter
from l2rw_ext.data.batch import describe, merge
from support.models import CLASSES, ENGINE_OPTIONS, cross_entropy, model_of, vectors
from support.oracle import assert_exact_steps


class _Encoding(UserDict[str, Any]):
    """As a tokeniser's: a mapping that is no dict, with more than its items."""

    encodings = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class _Pair(NamedTuple):
    x: Tensor
    scale: Tensor


@dataclass
class _Record:
    x: Tensor
    scale: Tensor
    more: Any = None


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


def _by_names() -> nn.Module:
    return model_of(lambda s, x, scale: s.a(x) * scale, a=nn.Linear(5, CLASSES))


def _by_attributes() -> nn.Module:
    return model_of(lambda s, b: s.a(b.x) * b.scale, a=nn.Linear(5, CLASSES))


def _named(make: Callable[[dict[str, Tensor]], Any]) -> Callable[[int], Any]:
    def batch(n: int) -> Any:
        return make({"x": _numbers(n, 5), "scale": _numbers(n, 1)}), _classes(n)

    return batch


def _packed(*, is_sorted: bool) -> Callable[[int], Any]:
    def batch(n: int) -> Any:
        lengths = [4, 4, 3, 2, 2, 1][-n:] if is_sorted else [2, 4, 1, 3, 4, 2][:n]
        x = pack_padded_sequence(
            _numbers(n, 4, 5), torch.tensor(lengths), batch_first=True, enforce_sorted=is_sorted
        )
        return x, _classes(n)

    return batch


def _recurrent() -> nn.Module:
    return model_of(
        lambda s, x: s.head(s.rnn(x)[1][0]), rnn=nn.GRU(5, 4), head=nn.Linear(4, CLASSES)
    )


def _images(n: int) -> Any:
    sizes = [(3, 6), (4, 3), (5, 5), (3, 3), (4, 6), (6, 3)][:n]
    return ([_numbers(2, *size) for size in sizes],), _classes(n)


def _detector() -> nn.Module:
    return model_of(
        lambda s, images: torch.stack([s.a(x.unsqueeze(0)).mean((0, 2, 3)) for x in images]),
        a=nn.Conv2d(2, CLASSES, 2),
    )


_FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "dict": (_by_names, _named(dict)),
    "OrderedDict": (_by_names, _named(OrderedDict)),
    "defaultdict": (_by_names, _named(lambda d: defaultdict(list, d))),
    "UserDict": (_by_names, _named(_Encoding)),
    "read-only mapping": (_by_names, _named(MappingProxyType)),
    "mapping as one argument": (_by_attributes, _named(lambda d: (_Encoding(d),))),
    "named tuple": (_by_names, _named(lambda d: _Pair(**d))),
    "named tuple as one argument": (_by_attributes, _named(lambda d: (_Pair(**d),))),
    "dataclass": (_by_attributes, _named(lambda d: _Record(**d))),
    "object": (_by_attributes, _named(lambda d: SimpleNamespace(**d))),
    "packed sequence": (_recurrent, _packed(is_sorted=True)),
    "packed sequence in another order": (_recurrent, _packed(is_sorted=False)),
    "list as one argument": (_detector, _images),
}


@pytest.mark.parametrize(
    ("form", "engine"),
    [
        (form, engine)
        for form, (make, _) in _FORMS.items()
        for engine in ENGINE_OPTIONS
        if engine != "layerwise" or make not in (_recurrent, _detector)
    ],
)
def test_forms_of_inputs(form: str, engine: Any) -> None:
    make, batch = _FORMS[form]
    model = make().double()
    train, clean = batch(6), batch(3)
    # A copy of a batch is of another kind where something of it is described by its address.
    assert describe(train[0]) == describe(batch(6)[0])
    assert_exact_steps(
        model, cross_entropy, train, clean, Reweighter(model, cross_entropy, engine=engine)
    )


def test_a_mapping_is_merged_whatever_the_order_of_its_keys() -> None:
    model = _by_names().double()
    train = _named(_Encoding)(6)
    clean = _named(lambda d: OrderedDict(reversed(d.items())))(4)
    reweighter = Reweighter(model, cross_entropy)
    assert_exact_steps(model, cross_entropy, train, clean, reweighter, engine="layerwise")
    assert "one merged forward" in reweighter.explain(train, clean).passes


@pytest.mark.parametrize("wrap", [lambda x: _Encoding(x=x), lambda x: (_Record(x, x),)])
def test_what_inputs_hold_is_checked_inside_of_objects(wrap: Any) -> None:
    x, y = vectors(4)
    model = _by_names().double()
    with pytest.raises(ValueError, match=r"shape \(4, 5\) was computed with grad"):
        Reweighter(model, cross_entropy).backward((wrap(2 * x.requires_grad_()), y), (x, y))


def test_rows_of_a_packed_sequence_are_not_merged() -> None:
    """Of sequences of length 1 there are as many rows as examples."""
    train, clean = (
        pack_padded_sequence(_numbers(3, 1, 5), torch.ones(3, dtype=torch.int64), True)
        for _ in range(2)
    )
    assert isinstance(train, PackedSequence)
    assert merge(train, clean, 3, 3) is None


def test_objects_are_merged_only_if_they_are_the_same() -> None:
    x, y = vectors(3)[0], vectors(2)[0]
    record = _Record(x[0], x[0])
    joined = merge((x, record), (y, record), 3, 2)
    assert joined is not None
    assert joined[1] is record
    for make in (lambda: _Record(x[0], x[0]), lambda: x.numpy(), lambda: SimpleNamespace()):
        assert merge((x, make()), (y, make()), 3, 2) is None


def test_arguments_that_differ() -> None:
    (x, y), model = vectors(4), _by_names().double()
    given: list[tuple[Any, Any]] = [
        (_Encoding(x=x), {"scale": x}),
        ((x, x), (x,)),
        (x, (x,)),
        (_Record(x, x), x),
    ]
    for train, clean in given:
        with pytest.raises(ValueError, match="differ in structure"):
            Reweighter(model, cross_entropy).backward((train, y), (clean, y))


def test_mappings_of_targets_reach_the_loss_as_they_are() -> None:
    model = nn.Linear(5, CLASSES).double()
    seen: set[type] = set()

    def loss(outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        seen.add(type(targets))
        return cross_entropy(outputs, targets["y"])

    (x, y), (a, b) = vectors(6), vectors(4)
    reweighter = Reweighter(model, loss)
    train, clean = (x, _Encoding(y=y)), (a, _Encoding(y=b))
    assert_exact_steps(model, loss, train, clean, reweighter, engine="layerwise")
    assert seen == {_Encoding}
