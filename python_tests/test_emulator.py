"""The emulator of CUDA kernels notices what a kernel does wrong."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.emulated

NUMBERS = torch.arange(68.0)
EXPECTED = NUMBERS[:64].flip(0)


class Fault(IntEnum):
    """As in emulator/faults.cu."""

    NONE = 0
    NO_BARRIER = auto()
    BARRIER_OF_SOME = auto()
    TWO_BARRIERS = auto()
    SHUFFLE_OF_SOME = auto()
    NO_WAIT = auto()
    NOT_CLOSED = auto()
    ODD_ADDRESS = auto()
    BEYOND_SHARED = auto()


def test_a_kernel_without_fault(emulator: Any) -> None:
    assert torch.equal(emulator.fault(NUMBERS, Fault.NONE), EXPECTED)


@pytest.mark.parametrize("fault", [Fault.NO_BARRIER, Fault.NO_WAIT])
def test_what_was_not_waited_for_is_not_there(emulator: Any, fault: Fault) -> None:
    assert not torch.equal(emulator.fault(NUMBERS, fault), EXPECTED)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault.BARRIER_OF_SOME, "threads wait at faults.cu:.* for others that never come"),
        (Fault.TWO_BARRIERS, "threads of one block wait at faults.cu:.* and at faults.cu:"),
        (Fault.SHUFFLE_OF_SOME, "threads wait at faults.cu:.* for others that never come"),
        (Fault.NOT_CLOSED, "a thread ended with copies that it had not closed"),
        (Fault.ODD_ADDRESS, "from an odd address"),
        (Fault.BEYOND_SHARED, "shared memory at 256"),
    ],
)
def test_a_fault_is_an_error(emulator: Any, fault: Fault, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulator.fault(NUMBERS, fault)
    test_a_kernel_without_fault(emulator)
