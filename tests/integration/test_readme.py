"""README and docs: the commands are those that CI runs, the links lead somewhere, the first example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARTIFACT = ROOT / "openmm_bg" / "data" / "alanine_dipeptide.bg"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The README's two commands: those that make their own environment."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_two_commands_do_their_own_set_up() -> None:
    main_job, tests = commands()
    assert main_job.endswith("openmm-bg demo")
    assert "-m pytest" in tests
    for command in (main_job, tests):
        assert "pip install" in command


def test_ci_runs_the_commands_as_written() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in commands():
        assert f'"{command}"' in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_ci_refuses_another_readme(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace(" -m pytest", " -m pytest -x"), encoding="utf-8")
    result = subprocess.run(["bash", str(script)], cwd="/", capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "README.md has no line that reads" in result.stderr


def missing_links(page: Path, text: str) -> list[str]:
    """Relative link targets of a page that are not there; code blocks are no links."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [t for t in local if not (page.parent / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    assert missing_links(page, page.read_text(encoding="utf-8")) == []


def test_missing_link_is_noticed() -> None:
    assert missing_links(ROOT / "README.md", "see [this](docs/no_such_page.md#part) and [that](LICENSE)") == [
        "docs/no_such_page.md"
    ]


def test_first_part_tells_of_explicit_water() -> None:
    first_part = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "keeps the solvent fixed" in " ".join(first_part.split())
    assert "acceptance is near zero" in " ".join(first_part.split())


@pytest.mark.skipif(not ARTIFACT.exists(), reason="the shipped artifact openmm_bg/data/alanine_dipeptide.bg is absent")
def test_first_example_runs(tmp_path: Path) -> None:
    example = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")[0]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Ensemble(exact, n=10000")
