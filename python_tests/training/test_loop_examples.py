"""The loops of Lightning, Hugging Face and Accelerate: their steps are exact, and they resume."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.loops import LOOPS, Loop, Seen
from support.oracle import flat, gradients_of, truth_of_ranks
from support.paths import ROOT, TESTS

pytestmark = [pytest.mark.examples, pytest.mark.filterwarnings("ignore")]

SINGLE = 1e-5
"""Relative error of a step in float32, whose sums have some thousand terms."""


@pytest.fixture(params=LOOPS)
def loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Loop]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # put back what frameworks leave here
    monkeypatch.chdir(tmp_path)
    yield LOOPS[request.param](monkeypatch, tmp_path)
    if request.param != "lightning":
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def _assert_exact(ranks: Sequence[list[Seen]], losses: Any) -> None:
    """The steps are those of one process on the union of micro-batches and ranks."""
    assert [len(step.micro_batches) for step in ranks[0]] == [2, 1]
    for steps in zip(*ranks, strict=True):
        batches, cleans = [], []
        for step in steps:
            parts, (clean, *_) = zip(*step.micro_batches, strict=True)
            batches.append(tree_map(lambda *micro_batches: torch.cat(micro_batches), *parts))
            cleans.append(clean)
        expected = truth_of_ranks(steps[0].model, losses, batches, cleans)
        for step, of_rank in zip(steps, expected, strict=True):
            assert relative_error(step.weights, of_rank.weights) < SINGLE
            gradients = flat(of_rank.gradients.values())
            assert relative_error(step.gradients, gradients) < SINGLE


def test_weights_and_gradients_are_those_of_the_union_of_micro_batches(loop: Loop) -> None:
    _assert_exact([loop.run(range(1), exact=True).seen], loop.losses)


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_make_one_step_together(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = LOOPS[name](monkeypatch, tmp_path).losses
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, str(TESTS / "support" / "loops.py"), name, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    saved = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    _assert_exact([*saved], losses)


def test_autocast_is_that_of_a_plain_loop(loop: Loop) -> None:
    for step in loop.run(range(1), exact=False).seen:
        plain = Reweighter(step.model, loop.losses)
        with torch.autocast("cpu", torch.bfloat16), plain.accumulate() as accumulation:
            for batch, clean in step.micro_batches:
                plain.backward(batch, clean)
        assert torch.equal(torch.cat(accumulation.weights), step.weights)
        assert torch.equal(flat(gradients_of(step.model).values()), step.gradients)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(loop: Loop) -> None:
    whole = loop.run(range(3), exact=False)
    loop.run(range(2), exact=False)
    resumed = loop.run(range(2, 3), exact=False)
    assert len(resumed.seen) == 2
    for a, b in zip(whole.core.parameters(), resumed.core.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, table in whole.record.state_dict().items():
        assert torch.equal(table, resumed.record.state_dict()[name]), name
    assert whole.record.visits.tolist() == [3] * 30


def test_the_script_prints_what_its_page_shows(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop.script, "EPOCHS", 2)
    loop.script.main()
    name = Path(loop.script.__file__).stem
    recorded = (ROOT / "docs" / "assets" / "examples" / f"{name}.txt").read_text()

    def lines(text: str) -> list[str]:
        return re.sub(r"\d+(\.\d+)?", "N", text).splitlines()

    assert set(lines(capsys.readouterr().out)) <= set(lines(recorded))
