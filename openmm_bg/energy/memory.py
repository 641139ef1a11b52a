"""How much memory this process may still take, for what would otherwise be killed without a word."""

from __future__ import annotations

from pathlib import Path

#: Linux's account of the machine's memory, and the limit of the container or job that this process runs in.
MEMINFO = Path("/proc/meminfo")
LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, at most the limit of the control group; None where nobody says."""
    found = [amount for amount in (_available(), _limit()) if amount is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(rest.split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _limit() -> int | None:
    try:
        return int(LIMIT.read_text())  # "max" is no number
    except (OSError, ValueError):
        return None
