"""The examples run as their first lines say, and reweighting helps there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from support.paths import ROOT


def _torchrun(script: str, processes: int) -> str:
    """What a script prints that runs in several processes on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*run, f"--nproc-per-node={processes}", str(ROOT / "examples" / script)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["ddp.py", "fsdp2.py"])
def test_training(script: str) -> None:
    printed = _torchrun(script, processes=2)
    plain, reweighted, flipped = (float(x) for x in re.findall(r"\d\.\d{3}", printed))
    assert plain + 0.05 < reweighted, printed
    assert flipped > 0.7, printed
