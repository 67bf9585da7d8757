"""Worker processes of a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.processes import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Three workers, which start at the first call."""
    with Pool() as pool:
        yield pool
