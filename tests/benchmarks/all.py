"""One table of everything that is measured here, in quick forms: a look at a machine, not figures to keep.

    python tests/benchmarks/all.py                        # several minutes
    python tests/benchmarks/all.py --only coordinates flow --threads 1

Runs the scripts beside this one, each in a process of its own, and prints what they found as one Markdown table, with
the peak of the memory that each of them took. The scripts themselves say what their figures mean; their own options
give figures worth keeping. A script that fails has a row that says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Row = tuple[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A quick run of one script, and how its output becomes rows (what, figure)."""

    script: str
    arguments: list[str]
    rows: Callable[[list[str]], Iterator[Row]]


def documents(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines."""
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)


def markdown(lines: list[str]) -> Iterator[Row]:
    """Rows of Markdown tables: the first cell after the system last named, the others with their columns' names."""
    heading = ""
    columns: list[str] = []
    for line in lines:
        if not line.startswith("|"):
            heading, columns = line.partition(":")[0] if " atoms, " in line else heading, []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set("".join(cells)) <= set("-:"):
            continue
        if not columns:
            columns = cells
            continue
        figures = [f"{cell} {name}".strip() for name, cell in zip(columns[1:], cells[1:], strict=True)]
        yield f"{heading}: {cells[0]}" if heading else cells[0], ", ".join(figures)


def coordinates(lines: list[str]) -> Iterator[Row]:
    names = {"forward": "q → x", "backward": "its backward", "inverse": "x → q"}
    for document in documents(lines):
        for system, found in document.items():
            what = f"{system}, {found['atoms']} atoms, batch {found['batch']}"
            for part, name in names.items():
                times = f"{found['ms'][part]:.2f} ms, {found['ns_per_atom'][part]:.0f} ns an atom"
                yield f"{what}: {name}", f"{times}, {found['speedup'][part]:.1f} times atom by atom"
            yield f"{what}: q → x and backward", f"{found['speedup']['forward_and_backward']:.1f} times atom by atom"


def flows(lines: list[str]) -> Iterator[Row]:
    for found in documents(lines):
        if "preset" not in found:
            continue
        what = f"{found['preset']} for {found['molecule']}, batch {found['batch']}"
        for name, seconds in found["maps"].items():
            yield f"{what}: {name}", f"{found['batch'] / seconds:,.0f} samples/s"
        yield f"{what}: training step", f"{found['batch'] / found['seconds']:,.0f} samples/s"
        yield f"{what}: training step, memory", f"{found['MiB per sample']['plain']:.2f} MiB a sample"


def sampling(lines: list[str]) -> Iterator[Row]:
    for found in documents(lines):
        for name, rate in found["samples_per_second"].items():
            yield f"{found['preset']} for {found['system']}: {name.replace('_', ' with ')}", f"{rate:,.1f} samples/s"


def end_to_end(lines: list[str]) -> Iterator[Row]:
    for document in documents(lines):
        found = document["weights"]
        rate, ess = found["samples_per_second"], found["ess"]
        yield "shipped dipeptide: flow, coordinates, energies", f"{rate:,.0f} weighted samples/s"
        yield "shipped dipeptide: effective samples", f"{rate * ess:,.0f} a second (ESS {100 * ess:.1f} %)"


BENCHMARKS = {
    "energies": [
        Benchmark(
            "energies.py", ["--batch", "64", "--turns", "1", "--seconds", "0.2", "--threads", "{threads}"], markdown
        )
    ],
    "coordinates": [
        Benchmark(
            "coordinates.py",
            ["--systems", "dipeptide", "hp35", "--batch", batch, "--repeats", "2", "--threads", "{threads}"],
            coordinates,
        )
        for batch in ("32", "256", "1024")
    ]
    + [
        Benchmark(
            "coordinates.py",
            ["--systems", "protein-g", "dhfr", "--batch", "256", "--repeats", "2", "--threads", "{threads}"],
            coordinates,
        )
    ],
    "flow": [
        Benchmark(
            "training.py", ["--presets", *presets, "--batch", batch, "--repeats", "2", "--layouts", *layouts], flows
        )
        for presets, layouts, batch in (
            (["cpu", "protein"], ["dipeptide", "hp35"], "32"),
            (["cpu", "protein"], ["dipeptide", "hp35"], "256"),
            (["paper"], ["hp35"], "4"),
        )
    ],
    "sampling": [Benchmark("proteins.py", ["--systems", "protein-g", "--rounds", "1", "--samples", "32"], sampling)],
    "end-to-end": [Benchmark("dipeptide.py", ["weights", "--samples", "20000"], end_to_end)],
    "moves": [Benchmark("moves.py", ["--repeats", "5"], markdown)],
}


def run(benchmark: Benchmark, threads: int) -> tuple[list[Row], bool]:
    """Rows of one script, and whether it ended well."""
    name = Path(benchmark.script).stem
    command = [sys.executable, str(HERE / benchmark.script), *(a.format(threads=threads) for a in benchmark.arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(command, stdout=out, stderr=err, cwd=HERE.parents[1], env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines, complaints = out.read().splitlines(), err.read().split("\n")
    if child.returncode:
        last = next((line for line in reversed(complaints) if line.strip()), "")
        return [(f"{name}: failed with status {child.returncode}", last.replace("|", "/"))], False
    rows = list(benchmark.rows(lines))
    if not rows:
        return [(f"{name}: printed no figures", "")], False
    return [*rows, (f"{name}, whole script: peak memory", f"{usage.ru_maxrss / 2**20:.2f} GiB")], True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"{datetime.date.today().isoformat()}, {platform.machine()}, {options.threads} thread(s)\n")
    print("| benchmark | what | figure |\n|---|---|---|")
    well = True
    for group in options.only:
        for benchmark in BENCHMARKS[group]:
            rows, fine = run(benchmark, options.threads)
            well = well and fine
            for what, figure in rows:
                print(f"| {group} | {what} | {figure} |", flush=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
