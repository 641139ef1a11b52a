"""kill -9 at random moments: what remains can always be resumed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: Enough that some seconds of training are left for the kills.
STEPS = 1000

# One process imports everything once and forks a child per run, which it kills after a random while.
SCRIPT = """
import importlib.util, os, random, signal, sys, time
from pathlib import Path
import openmm_bg.energy  # imported here, not by the children's first step
from openmm_bg.training import Stage, Trainer, checkpoint

spec = importlib.util.spec_from_file_location("stand_ins", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
directory, steps = Path(sys.argv[2]), int(sys.argv[3])
stage = Stage(name="buffer", losses={"buffer": 1}, steps=steps, learning_rate=1e-3)
config = kit.small_config([stage], checkpoint_every=1)

def train(folder, out):
    flow, data = kit.AffineDensity(3), kit.torsion_data(200)
    options = dict(target=kit.TorsionTarget(), directory=folder, progress=False)
    rows = Trainer(flow, data, config, **options).run(resume=True)
    out.write_text("\\n".join(repr(row["loss"]) for row in rows))

train(None, directory / "whole")  # first: it also imports what would delay the children's first step
chance = random.Random(0)

def stamp():
    file = directory / "run" / "checkpoint.json"
    return file.stat().st_mtime_ns if file.exists() else 0

finished = directory / "finished"
log = []
for attempt in range(60):
    pid = os.fork()
    if pid == 0:
        try:
            train(directory / "run", finished)
            os._exit(0)
        finally:
            os._exit(1)
    # A step writes its checkpoint within milliseconds: most kills meet a file half-written. The first two may come
    # before any, the others after some steps of this run, however slow the machine.
    deadline = time.monotonic() + chance.uniform(0.05, 0.2) if attempt < 2 else float("inf")
    before = stamp()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if 2 <= attempt < 8 and before is not None and stamp() != before:
            deadline, before = time.monotonic() + chance.uniform(0.0, 0.3), None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    reached = checkpoint.load(directory / "run")[0] if checkpoint.exists(directory / "run") else -1
    print("run", code, reached, flush=True)
    if code != -signal.SIGKILL:
        break
"""


def test_kill_at_random_moments(tmp_path):
    conftest = str(Path(__file__).with_name("conftest.py"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, conftest, str(tmp_path), str(STEPS)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    runs = [tuple(map(int, run)) for run in re.findall(r"run (-?\d+) (-?\d+)", done.stdout)]
    killed = [reached for code, reached in runs if code == -9]
    assert len(killed) >= 3 and 0 < max(killed) < STEPS, runs
    assert killed == sorted(killed)  # never behind an earlier checkpoint
    assert runs[-1] == (0, STEPS), done.stderr
    assert (tmp_path / "finished").read_text() == (tmp_path / "whole").read_text()
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(left) == 3 and not any(name.endswith(".tmp") for name in left)
