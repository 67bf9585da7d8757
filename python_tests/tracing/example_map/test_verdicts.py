"""The verdict on each of the small models."""

from __future__ import annotations

import pytest

from support.example_maps import mapped
from support.small_models import CASES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    row = CASES[name]
    verdict, example_map, _ = mapped(*row.make())
    assert (verdict.kind, verdict.apart) == (row.expected, row.apart), verdict.reason
    assert not example_map.failures
