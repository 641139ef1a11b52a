"""The conda recipe says what pyproject.toml says, under conda's names."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]

#: PyPI name to conda-forge name, where they differ. The conda packages named here leave out what sampling and
#: training do not need (Qt for matplotlib, JAX for pymbar).
CONDA_NAMES = {"matplotlib": "matplotlib-base", "pymbar": "pymbar-core", "torch": "pytorch"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def recipe() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conda-recipe" / "recipe.yaml").read_text(encoding="utf-8"))


def requirement(line: str) -> tuple[str, frozenset[str]]:
    """Name and version clauses of a pip or conda requirement of the simple kind that both files keep to."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*((?:[<>=!~]=?[^,\s]+)(?:,[<>=!~]=?[^,\s]+)*)?", line)
    assert found, f"{line!r} is not 'name' or 'name >=1,<2'"
    return found[1].lower(), frozenset((found[2] or "").split(",")) - {""}


def disagreements(recipe: dict[str, Any], project: dict[str, Any]) -> list[str]:
    """Every point on which the two files differ, one line each."""
    found = []
    metadata = project["project"]
    context = recipe["context"]
    if context["version"] != metadata["version"]:
        found.append(f"version {context['version']} against {metadata['version']}")
    if context["name"] != metadata["name"]:
        found.append(f"name {context['name']} against {metadata['name']}")
    if f">={context['python_min']}" != metadata["requires-python"]:
        found.append(f"python_min {context['python_min']} against {metadata['requires-python']}")
    ours = dict(map(requirement, metadata["dependencies"]))
    ours = {CONDA_NAMES.get(name, name): clauses for name, clauses in ours.items()}
    run = recipe["requirements"]["run"]
    if "python >=${{ python_min }}" not in run:
        found.append("run requirements do not hold python to python_min")
    theirs = dict(requirement(line) for line in run if not line.startswith("python "))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            found.append(f"{name}: recipe {theirs.get(name)}, pyproject {ours.get(name)}")
    backend = {f"{name}{','.join(clauses)}" for name, clauses in map(requirement, project["build-system"]["requires"])}
    host = {f"{name}{','.join(clauses)}" for name, clauses in map(requirement, recipe["requirements"]["host"][1:])}
    if not backend <= host:
        found.append(f"build requirements {backend - host} are missing from host")
    scripts = sorted(f"{name} = {target}" for name, target in metadata["scripts"].items())
    if sorted(recipe["build"]["python"]["entry_points"]) != scripts:
        found.append(f"entry points {recipe['build']['python']['entry_points']} against {scripts}")
    if recipe["about"]["license"] != metadata["license"]:
        found.append(f"license {recipe['about']['license']} against {metadata['license']}")
    return found


def test_recipe_agrees_with_pyproject() -> None:
    assert disagreements(recipe(), pyproject()) == []


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        (("context", "version"), "9.9.9", "version"),
        (("context", "python_min"), "3.10", "python_min"),
        (("requirements", "run", 5), "numpy >=1.0", "numpy"),
        (("requirements", "run", 5), "scipy", "scipy"),
        (("build", "python", "entry_points", 0), "openmm-bg = openmm_bg.demo:main", "entry points"),
    ],
)
def test_disagreement_is_noticed(where: tuple[Any, ...], value: str, expected: str) -> None:
    changed = copy.deepcopy(recipe())
    place = changed
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert any(expected in line for line in disagreements(changed, pyproject()))


def test_recipe_is_noarch_and_tests_itself() -> None:
    data = recipe()
    assert data["schema_version"] == 1
    assert data["build"]["noarch"] == "python"
    for option in ("--no-deps", "--no-build-isolation"):
        assert option in data["build"]["script"]
    assert any(line.split()[0] == "openmm-torch" for line in data["requirements"]["run_constraints"])
    imports = [name for test in data["tests"] for name in test.get("python", {}).get("imports", [])]
    for name in imports:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / name.replace(".", "/")).is_dir()
    assert "openmm_bg" in imports
    assert any("openmm-bg --help" in test.get("script", []) for test in data["tests"])
