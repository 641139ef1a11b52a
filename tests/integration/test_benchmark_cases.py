"""The cases of pytest-benchmark run, each once: what they time is not looked at."""

import re
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parents[1] / "benchmarks" / "cases.py"


def test_cases_run():
    command = [sys.executable, "-m", "pytest", "-q", str(CASES), "--benchmark-disable", "-k", "dipeptide and 16"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"], capture_output=True, text=True, timeout=300, cwd=CASES.parents[2]
    )
    assert result.returncode == 0, result.stdout
    found = re.search(r"(\d+) passed", result.stdout)
    assert found is not None and int(found[1]) == 8, "three ways to energies, two maps of coordinates, three of a flow"
