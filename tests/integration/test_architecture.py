"""docs/architecture.md, enforced: who may import whom, and what a user who only samples never loads.

Statements about source are checked on the syntax tree, where imports inside functions show too; statements about what
gets loaded are checked in a fresh process.
"""

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "openmm_bg"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MAX_LINES = 500
#: Needed for reports, file formats and estimators only; sampling does without.
HEAVY = ("matplotlib", "parmed", "pymbar", "arviz_stats", "arviz", "openmmtools", "mdtraj")


def room_of(path: Path) -> str:
    """First level below the package: ``flow`` for flow/build.py, ``weights`` for weights.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def statements(tree: ast.AST, module_level: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that can run; with ``module_level`` only those that run when the module is imported."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from statements(ast.Module(node.orelse, []), module_level)
            continue
        if module_level and isinstance(node, functions):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from statements(node, module_level)


def imported(source: str, package: str, module_level: bool = False) -> set[str]:
    """Dotted names that a module of ``package`` imports; ``from a import b`` gives a.b, which may be no module."""
    names: set[str] = set()
    for node in statements(ast.parse(source), module_level):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1])
            base = f"{above}.{base}" if base else above
        names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def package_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


def imports(path: Path, module_level: bool = False) -> set[str]:
    return imported(path.read_text(encoding="utf-8"), package_of(path), module_level)


def top(name: str) -> str:
    return name.split(".")[0]


def documented() -> dict[str, set[str]]:
    """The table of rooms in docs/architecture.md: room -> rooms that it imports."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/?(?:\.py)?` \|[^|]*\|([^|]*)\|$", text, flags=re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows}


def undocumented(source: str, path: Path, table: dict[str, set[str]]) -> list[str]:
    """Imports of other rooms that the table does not have."""
    room = room_of(path)
    found = []
    for name in sorted(imported(source, package_of(path))):
        parts = name.split(".")
        if parts[0] != "openmm_bg" or len(parts) < 2 or parts[1] == room:
            continue
        if parts[1] not in table.get(room, set()):
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


# -------------------------------------------------------------------- on the syntax tree


def test_every_room_is_documented() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms == set(documented())


# The package's own __init__ takes public names from everywhere, when they are used: see test_import_alone_is_light.
@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_follow_the_documented_arrows(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8"), path, documented()) == []


def test_documented_arrows_have_no_cycle() -> None:
    table = documented()
    while table:
        leaves = {room for room, needs in table.items() if not needs & table.keys()}
        assert leaves, f"a cycle among {sorted(table)}"
        table = {room: needs for room, needs in table.items() if room not in leaves}


def test_documented_arrows_keep_the_rules() -> None:
    table = documented()
    assert table["flow"] == {"errors"}
    assert table["coordinates"] == {"errors", "flow"}
    assert table["rules"] == {"errors"}
    for room in (
        "flow",
        "coordinates",
        "energy",
        "weights",
        "rules",
        "artifact",
        "sampler",
        "moves",
        "data",
        "mcmc",
        "replica",
    ):
        assert not table[room] & {"training", "simulate", "demo", "cli"}
    assert not table["energy"] & {"flow", "sampler", "training"}


def test_a_wrong_import_is_noticed() -> None:
    table = {"flow": {"errors"}, "energy": {"errors"}}
    flow, pool = PACKAGE / "flow" / "build.py", PACKAGE / "energy" / "pool.py"
    assert undocumented("def f():\n    from openmm_bg.energy import Target", flow, table)
    assert undocumented("from ..sampler import CHUNK", pool, table)
    assert undocumented("from .. import sampler", pool, table)
    assert not undocumented("from ..errors import InputError\nfrom .workers import Workers", pool, table)
    assert imported("class A:\n    import parmed", "openmm_bg", module_level=True) == {"parmed"}
    assert imported("def f():\n    import parmed", "openmm_bg", module_level=True) == set()
    guarded = "if TYPE_CHECKING:\n    import parmed\nelse:\n    import mdtraj"
    assert imported(guarded, "openmm_bg", module_level=True) == {"mdtraj"}


def test_flow_and_rules_know_no_openmm() -> None:
    for path in [*(PACKAGE / "flow").glob("*.py"), *(PACKAGE / "rules").glob("*.py")]:
        assert "openmm" not in {top(name) for name in imports(path)}, path


def test_coordinates_know_no_context() -> None:
    for path in (PACKAGE / "coordinates").glob("*.py"):
        assert "openmm" not in {top(name) for name in imports(path, module_level=True)}, path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        used |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not used & {"Context", "Integrator", "Platform"}, path


def test_openmmtools_stays_in_mcmc_and_demo() -> None:
    users = {room_of(path) for path in MODULES if "openmmtools" in {top(name) for name in imports(path)}}
    assert users <= {"mcmc", "demo"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports_wait_for_their_use(path: Path) -> None:
    # The class of `mcmc` has its base in openmmtools, and nobody imports that room without wanting openmmtools.
    allowed = {"openmmtools"} if room_of(path) == "mcmc" else set()
    assert not {top(name) for name in imports(path, module_level=True)} & set(HEAVY) - allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: does it hold a second idea?"


# -------------------------------------------------------------------- in a fresh process


def loaded(code: str, *watched: str, arguments: tuple[str, ...] = ()) -> set[str]:
    """Which of the watched packages and modules are loaded after ``code`` has run in a process of its own."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}\n"
    script += f"import json; print(json.dumps([m for m in {list(watched)!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_alone_is_light() -> None:
    assert loaded("import openmm_bg; dir(openmm_bg)", "torch", "openmm", "numpy", *HEAVY) == set()


def test_sampling_path_is_light() -> None:
    code = "import openmm_bg.sampler, openmm_bg.artifact, openmm_bg.weights, openmm_bg.data"
    watched = (*HEAVY, "openmm_bg.training", "openmm_bg.demo", "openmm_bg.simulate", "openmm_bg.cli", "torch")
    assert loaded(code, *watched) == {"torch"}


def test_training_needs_no_openmmtools() -> None:
    found = loaded("import openmm_bg; openmm_bg.train", "openmm_bg.training.run", "openmmtools", "matplotlib", "parmed")
    assert found == {"openmm_bg.training.run"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained flow of alanine dipeptide, saved."""
    import numpy as np
    from openmm import XmlSerializer
    from openmmtools.testsystems import AlanineDipeptideVacuum

    from openmm_bg.artifact import Flow, compress_text, topology_to_dict
    from openmm_bg.coordinates import CoordinateMap, read_constraints
    from openmm_bg.flow import FlowConfig, build_flow

    test = AlanineDipeptideVacuum()
    rng = np.random.default_rng(0)
    frames = test.positions._value + rng.normal(0.0, 0.002, (50, 22, 3))
    coordinates = CoordinateMap.fit(test.topology, frames, read_constraints(test.system, test.topology), "full")
    density = build_flow(coordinates.layout, FlowConfig.preset("cpu", hidden=8, n_hidden=0))
    metadata = {
        "temperature": 300.0,
        "topology": topology_to_dict(test.topology),
        "system": compress_text(XmlSerializer.serialize(test.system)),
        "positions": np.asarray(test.positions._value).tolist(),
    }
    path = tmp_path_factory.mktemp("artifact") / "flow.bg"
    Flow(density, coordinates, metadata).save(path)
    return path


def test_sampling_from_a_file_never_loads_training(artifact: Path) -> None:
    """Load, sample, weigh, move and train by gradient, with the training room not only unused but unimportable."""
    code = """
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.startswith(("openmm_bg.training", "openmm_bg.demo", "openmmtools", "matplotlib", "parmed")):
                raise ImportError(f"{name} has no business here")

    sys.meta_path.insert(0, Refuse())
    import openmm_bg as bg

    flow = bg.load(sys.argv[1])
    import openmm

    context = openmm.Context(flow.system, openmm.LangevinMiddleIntegrator(300, 1, 0.001))
    context.setPositions(flow.metadata["positions"])
    with bg.BoltzmannGeneratorSampler(flow, context, seed=1, platform="Reference", n_workers=1) as sampler:
        ensemble = sampler.sample(20)
        assert ensemble.positions.shape == (20, 22, 3) and 0 < ensemble.ess <= 1
        assert sampler.step(5)["n_proposed"] == 5
        sampler.reverse_kl(4).backward()
    """
    watched = ("openmm_bg.training", "openmm_bg.sampler", *HEAVY)
    assert loaded(code, *watched, arguments=(str(artifact),)) == {"openmm_bg.sampler"}
