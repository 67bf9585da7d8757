"""``CleanBatches`` shows every example once in each pass, in an order that its seed decides."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset, TensorDataset

from l2rw_ext import CleanBatches
from support.models import vectors


def _indices(batches: CleanBatches, count: int) -> list[list[int]]:
    return [next(batches)[1].tolist() for _ in range(count)]


def _set(size: int) -> Any:
    return torch.arange(size).float().unsqueeze(1), torch.arange(size)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_each_pass_shows_every_example_once(size: int, batch_size: int, seed: int) -> None:
    batches = CleanBatches(_set(size), batch_size, seed=seed)
    drawn = _indices(batches, 3 * size)
    assert all(len(batch) == batch_size for batch in drawn)
    flat = list(itertools.chain(*drawn))
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == list(range(size))


def test_inputs_stay_with_their_targets() -> None:
    for x, y in itertools.islice(CleanBatches(_set(5), 3), 10):
        assert x.shape == (3, 1)
        assert torch.equal(x.squeeze(1), y.float())


def test_order_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = _indices(CleanBatches(_set(9), 4, seed=3), 20)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert _indices(CleanBatches(_set(9), 4, seed=3), 20) == first
    assert _indices(CleanBatches(_set(9), 4, seed=4), 20) != first


def test_passes_are_shuffled_anew() -> None:
    drawn = _indices(CleanBatches(_set(9)), 4)
    assert len({tuple(batch) for batch in drawn}) == 4


def test_order_is_the_same_in_every_process() -> None:
    """Fixed numbers: a checkpoint resumes elsewhere."""
    drawn = _indices(CleanBatches(_set(5), 3, seed=1), 4)
    assert drawn == _indices(CleanBatches(_set(5), 3, seed=1), 4)
    restored = CleanBatches(_set(5), 3)
    restored.load_state_dict({"seed": 1, "drawn": 6})
    assert _indices(restored, 2) == drawn[2:]


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 12))
def test_state_resumes(size: int, batch_size: int, steps: int) -> None:
    batches = CleanBatches(_set(size), batch_size, seed=5)
    _indices(batches, steps)
    state = batches.state_dict()
    expected = _indices(batches, 5)
    other = CleanBatches(_set(size), batch_size, seed=0)
    _indices(other, 2)
    other.load_state_dict(state)
    assert _indices(other, 5) == expected


def test_default_is_the_whole_set() -> None:
    x, y = next(CleanBatches(_set(6)))
    assert x.shape == (6, 1)
    assert sorted(y.tolist()) == list(range(6))


def test_datasets_and_nests() -> None:
    x, y = _set(6)
    for data in (
        TensorDataset(x, y),
        _List(list(zip(x, y, strict=True))),
        list(zip(x, y, strict=True)),
    ):
        if isinstance(data, list):
            continue
        a, b = next(CleanBatches(data, 4))
        assert a.shape == (4, 1)
        assert torch.equal(a.squeeze(1), b.float())
    inputs, targets = next(CleanBatches(({"x": x, "scale": 2.0}, (y, y + 1)), 4))
    assert inputs["scale"] == 2.0
    assert torch.equal(inputs["x"].squeeze(1), targets[0].float())
    assert torch.equal(targets[0] + 1, targets[1])


def test_mappings_of_any_type() -> None:
    """What torch's trees take for a leaf is drawn from, too."""
    x, y = _set(6)
    inputs, targets = next(CleanBatches((UserDict(x=x, more=MappingProxyType({"x": x})), y), 4))
    assert torch.equal(inputs["x"].squeeze(1), targets.float())
    assert torch.equal(inputs["more"]["x"], inputs["x"])
    examples = [(UserDict(x=a), b) for a, b in zip(x, y, strict=True)]
    inputs, targets = next(CleanBatches(_List(examples), 4, device="meta"))
    assert inputs["x"].device.type == targets.device.type == "meta"


def test_examples_that_torch_does_not_collate() -> None:
    """Sequences of several lengths: a packed one moves, but for its lengths, which stay."""

    def collate(examples: list[Any]) -> Any:
        sequences, classes = zip(*examples, strict=True)
        return pack_sequence(sequences, enforce_sorted=False), torch.stack(classes)

    examples = [(torch.full((k, 2), float(k)), torch.tensor(k)) for k in (3, 1, 4, 2)]
    for device in (None, "meta"):
        batches = CleanBatches(_List(examples), 3, device=device, collate_fn=collate)
        inputs, classes = next(batches)
        assert isinstance(inputs, PackedSequence)
        assert inputs.batch_sizes.device.type == "cpu"
        assert inputs.data.device == classes.device
    _, lengths = pad_packed_sequence(next(CleanBatches(_List(examples), 3, collate_fn=collate))[0])
    expected = next(CleanBatches(_List(examples), 3, collate_fn=collate))[1]
    assert lengths.tolist() == expected.tolist()


class _List(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def test_device() -> None:
    x, y = next(CleanBatches(_set(6), 2, device="meta"))
    assert x.device.type == y.device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(device: str) -> None:
    data = _set(6)
    batches = CleanBatches(data, 4)
    expected = _indices(CleanBatches(data, 4), 3)
    torch.set_default_device(device)
    try:
        assert _indices(batches, 3) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CleanBatches((torch.zeros(0, 2), torch.zeros(0))), "clean set is empty"),
        (lambda: CleanBatches(vectors(4), 0), "batch_size must be at least 1, got 0"),
        (lambda: CleanBatches((torch.zeros(3), torch.zeros(4))), r"differ in length: \[3, 4\]"),
        (lambda: CleanBatches((torch.zeros(3),) * 3), "got 3 parts"),
        (lambda: CleanBatches(([1, 2], [3, 4])), "no tensor"),
        (lambda: CleanBatches((torch.zeros(3), object())), "type object has no rows.*collate_fn"),
        (lambda: CleanBatches(iter([1])), "got list_iterator"),
        (lambda: CleanBatches(torch.zeros(3)), "expected a dataset or a pair of.*got Tensor"),
    ],
)
def test_clean_sets(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_batches_that_are_no_pair() -> None:
    """As of a dataset whose examples are dicts, or hold their number, too."""

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"x": torch.zeros(2), "y": index}

    with pytest.raises(TypeError, match=r"got dict of length 2; .*batch.pop\(NAME\)"):
        next(CleanBatches(Rows()))
    numbered = TensorDataset(*[torch.arange(3)] * 3)
    with pytest.raises(TypeError, match=r"a pair .*, got list of length 3"):
        next(CleanBatches(numbered))
    with pytest.raises(ValueError, match=r"got dict; give .inputs, targets"):
        CleanBatches({"x": torch.zeros(3), "y": torch.zeros(3)})
