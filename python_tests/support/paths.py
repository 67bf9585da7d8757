"""Where the checkout and the parts of it that tests read lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
EMULATOR = TESTS / "cuda" / "emulator"
INDEX_TEST = TESTS / "cuda" / "cuda_index_test.cpp"
