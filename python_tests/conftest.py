"""Fixtures and rules that all tests share."""

from __future__ import annotations

import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("L2RW_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where a GPU or the emulator is required, a skipped test of it is a failure."""
    report = yield
    for marker, variable in (("cuda", "L2RW_REQUIRE_CUDA"), ("emulated", "L2RW_REQUIRE_EMULATOR")):
        required = os.environ.get(variable) == "1"
        if required and report.skipped and item.get_closest_marker(marker):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and {variable}=1"
    return report


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
