"""Sphinx: ``pip install '.[docs]' && sphinx-build -W -b html docs docs/_build/html``."""

import tomllib
from pathlib import Path

_metadata = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "openmm_bg"
author = "openmm_bg contributors"
project_copyright = f"2026, {author}"
version = release = _metadata["version"]

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4

html_theme = "alabaster"
html_theme_options = {"description": _metadata["description"], "fixed_sidebar": True}
