"""A part of each attack of `attacks/`; the whole is run by `python -m attacks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCALES = {"templates": 0.1, "resume": 0.07, "checkpoints": 0.02, "files": 0.05, "forged": 0.1, "fuzz": 0.05}


@pytest.mark.full
@pytest.mark.parametrize("name", SCALES)
def test_nothing_is_bad(name):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "attacks", name, "--scale", str(SCALES[name])],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
