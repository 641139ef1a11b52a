"""Code that may end the process instead of raising, run in another one: drivers, plugins that do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

#: Seconds that a probe may take; the first import of torch from a slow disk needs most of them.
TIMEOUT = 120.0


def run_isolated(code: str, timeout: float, *arguments: str) -> tuple[bool, str]:
    """Run code in another Python with the same import path.

    Parameters
    ----------
    code
        Python source; its last line of output is the answer.
    timeout
        Seconds.
    *arguments
        For ``sys.argv[1:]``.

    Returns
    -------
    works : bool
        Whether it ended normally.
    detail : str
        The last line that it wrote, or how it ended.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    except OSError as error:
        return False, f"Python could not be started ({error.strerror or error})"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if done.returncode == 0:
        return True, last
    if done.returncode < 0:
        try:
            how = signal.Signals(-done.returncode).name
        except ValueError:
            how = f"signal {-done.returncode}"
        return False, f"the process crashed ({how})"
    return False, last or f"the process ended with code {done.returncode}"
