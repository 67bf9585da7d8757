"""Every rule is held to its operation, in the small models."""

from __future__ import annotations

import pytest

from support.example_maps import Checked, mapped
from support.small_models import CASES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CASES if "compiled" not in name])
def test_operations_of_models(name: str) -> None:
    example_map = mapped(*CASES[name].make(), kind=Checked).example_map
    assert isinstance(example_map, Checked)
    assert not example_map.wrong
