"""What GPUs can do by their data sheets, and what a launch is taken to cost.

All rates are dense, without structured sparsity. The data sheets of Hopper print tensor cores with
sparsity, of which these are half.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ceilings import Ceilings

EAGER_LAUNCH = 5e-6
"""Not measured: seconds of the host for an operation of torch, forward or backward."""

GRAPH_LAUNCH = 3e-6
"""Not measured: seconds to start the replay of a CUDA graph."""

GRAPH_NODE = 1.5e-6
"""Not measured: seconds between two kernels of a graph, in which no processor computes."""

_MMA_SYNC_ON_HOPPER = 0.6
# docs/kernels.md, "Products of warpgroups".


@dataclass(frozen=True)
class DataSheet:
    """A GPU.

    ``library`` is what the data sheet gives, which the products of cuBLAS and cuDNN can reach.
    ``own`` is what this package's kernels can: ``mma.sync``, and ordinary multiply-adds in float32
    and float64. ``warpgroups`` tells whether they can reach ``library`` with ``wgmma``.
    """

    title: str
    library: Ceilings
    own: Ceilings
    warpgroups: bool


def _sheet(
    title: str,
    *,
    narrow: float,
    tf32: float,
    fp32: float,
    fp64: float,
    fp64_tensor: float,
    moved: float,
    hopper: bool,
) -> DataSheet:
    """From 10^12 operations and bytes a second."""
    rates = {"bf16": narrow, "fp16": narrow, "tf32": tf32, "fp32": fp32, "fp64": fp64_tensor}
    share = _MMA_SYNC_ON_HOPPER if hopper else 1.0
    own = {k: rate * share for k, rate in rates.items()} | {"fp32": fp32, "fp64": fp64}
    library, kernels = (
        Ceilings({k: 1e12 * rate for k, rate in found.items()}, 1e12 * moved)
        for found in (rates, own)
    )
    return DataSheet(title, library, kernels, hopper)


DATA_SHEETS = {
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM.
    "h100": _sheet(
        "H100 SXM, 80 GB",
        narrow=989,
        tf32=494,
        fp32=67,
        fp64=34,
        fp64_tensor=67,
        moved=3.35,
        hopper=True,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM.
    "h200": _sheet(
        "H200 SXM, 141 GB",
        narrow=989,
        tf32=494,
        fp32=67,
        fp64=34,
        fp64_tensor=67,
        moved=4.8,
        hopper=True,
    ),
    # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: 2,039 GB/s.
    "a100": _sheet(
        "A100 SXM, 80 GB",
        narrow=312,
        tf32=156,
        fp32=19.5,
        fp64=9.7,
        fp64_tensor=19.5,
        moved=2.039,
        hopper=False,
    ),
}
