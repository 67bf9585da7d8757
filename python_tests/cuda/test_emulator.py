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


class ProductFault(IntEnum):
    """As in emulator/faults.cu."""

    NONE = 0
    NOT_SHOWN = auto()
    SHOWN_TOO_EARLY = auto()
    READ_TOO_EARLY = auto()
    OVERWRITTEN = auto()
    NOT_WAITED_FOR = auto()
    SOME_LANES = auto()
    NO_FENCE = auto()
    OTHER_MATRIX = auto()
    SOME_WARPS = auto()


ROWS = torch.randint(-8, 9, (64 + 192, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
PRODUCT = ROWS[:64].float() @ ROWS[64:].float().T


def test_a_product_of_a_warpgroup(emulator: Any) -> None:
    assert torch.equal(emulator.product(ROWS, ProductFault.NONE), PRODUCT)


@pytest.mark.parametrize("fault", [ProductFault.READ_TOO_EARLY, ProductFault.OVERWRITTEN])
def test_products_run_beside_the_computation(emulator: Any, fault: ProductFault) -> None:
    assert not torch.equal(emulator.product(ROWS, fault), PRODUCT)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ProductFault.NOT_SHOWN, "reads copies that were not shown to it"),
        (ProductFault.SHOWN_TOO_EARLY, "reads copies that were not shown to it"),
        (ProductFault.NOT_WAITED_FOR, "a thread ended with products that it had not waited for"),
        (ProductFault.SOME_LANES, "lanes of one warp exchange at faults.cu:.* and at faults.cu:"),
        (ProductFault.NO_FENCE, "a group of products of a warpgroup without a fence before it"),
        (ProductFault.OTHER_MATRIX, "threads of a warpgroup multiply different matrices"),
        (ProductFault.SOME_WARPS, "a thread has no part in a product of its warpgroup"),
    ],
)
def test_a_fault_of_a_product_is_an_error(emulator: Any, fault: ProductFault, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulator.product(ROWS, fault)
    test_a_product_of_a_warpgroup(emulator)
