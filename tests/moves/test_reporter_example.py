"""The example of MD with moves by a reporter, run as a user would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("move", ["independence", "latent", "nonequilibrium"])
def test_moves_with_reporter(tmp_path, move):
    script = str(ROOT / "examples" / "moves_with_reporter.py")
    result = subprocess.run(
        [sys.executable, script, "--steps", "60", "--interval", "10", "--move", move],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    found = re.search(r"accepted (\d+) of (\d+) moves", result.stdout)
    assert found is not None and int(found[2]) == 6 and 0 < int(found[1]) <= 6
    steps = [int(line.split(",")[0]) for line in result.stdout.splitlines() if re.match(r"\d+,", line)]
    assert steps == [10, 20, 30, 40, 50, 60]  # moves change neither step count nor what other reporters are due
