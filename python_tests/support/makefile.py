"""``make`` as a user starts it, also where the tests themselves run under one."""

from __future__ import annotations

import os
import subprocess

KEPT = ("HOME", "LANG", "PATH", "TMPDIR")


def make(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it and take down what it prints.

    The variables of an outer command, such as ``make test ARGS=...``, are exported to all that it
    starts, by their own names too, and would be those of this one.
    """
    environment = {name: value for name, value in os.environ.items() if name in KEPT}
    return subprocess.run(
        ["make", *arguments], env=environment, capture_output=True, text=True, check=check
    )
