"""The example of OpenMM's replica exchange, as a user would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import openmm_bg as bg

ROOT = Path(__file__).parents[2]


def test_replica_exchange_moves(tmp_path):
    bg.load_alanine_dipeptide().flow.save(tmp_path / "hot.bg")  # any flow of the molecule is exact
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "replica_exchange_moves.py"), "--iterations", "4"),
            *("--md-steps", "5", "--temperatures", "300", "350", "--proposals", "4", "--hot-flow", "hot.bg"),
            *("-o", "run"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert {"log.csv", "energy.csv", "checkpoint_1.xml", "flow_moves.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    for temperature in (300, 350):
        found = re.search(rf"{temperature} K: accepted (\d+) of (\d+) moves", result.stdout)
        assert found is not None and 0 <= int(found[1]) <= int(found[2]) == 4
    found = re.search(r"states \(1, 0\): accepted (\d+) of (\d+) learned swaps", result.stdout)
    assert found is not None and 0 <= int(found[1]) <= int(found[2]) == 4


def test_a_folder_in_use_is_no_traceback(tmp_path):
    (tmp_path / "log.csv").write_text("")
    for arguments in (["-o", str(tmp_path)], ["--resume"]):
        result = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "replica_exchange_moves.py"), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert result.returncode == 2 and "--resume continues" in result.stderr and "Traceback" not in result.stderr
