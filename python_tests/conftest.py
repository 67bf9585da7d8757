"""Fixtures and rules that all tests share."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator

import pytest

# Processes that share the cores have one thread each, and so has what they start. This must be said
# before torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# The assertions of these modules say what they compared; the second one has a fixture.
pytest.register_assert_rewrite("support")
pytest_plugins = ["support.emulation"]

settings.register_profile(
    "l2rw",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("l2rw")

# Hypothesis also draws constants of the modules that a process has loaded. Without them the same is
# drawn in every process and in every order of the tests.
if hasattr(providers, "is_local_module_file"):
    providers.is_local_module_file = lambda path: False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the host")
    config.addinivalue_line("markers", "examples: needs packages of the extra `examples`")


THOROUGH = {"databases", "zoo", "soak"}
"""Markers of tests that run only where ``-m`` names them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes",
        type=float,
        help="run tests in an order that their names decide, and skip what has not begun by then",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unnamed = {name for name in THOROUGH if name not in config.option.markexpr}
    left_out = [item for item in items if unnamed & {mark.name for mark in item.iter_markers()}]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if config.option.minutes is not None:
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    if torch.cuda.is_available() or os.environ.get("L2RW_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


_BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.option.minutes
    if minutes is not None and time.monotonic() - _BEGAN > 60 * minutes:
        pytest.skip(f"not begun within {minutes:g} minutes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where a GPU, the emulator or examples are required, a skipped test of them is a failure."""
    report = yield
    for marker, required_by in (
        ("cuda", "CUDA"),
        ("emulated", "EMULATOR"),
        ("examples", "EXAMPLES"),
    ):
        variable = f"L2RW_REQUIRE_{required_by}"
        required = os.environ.get(variable) == "1"
        if required and report.skipped and item.get_closest_marker(marker):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and {variable}=1"
    return report


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
