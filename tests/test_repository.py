"""Rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_imports

import clipmini

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_clipmini", "clipmini", "training")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Each folder imports only from those above it, and from itself; `clipmini/__init__.py`, `cli.py` and `console.py`
# stand below all.
LADDER = (
    "configuration",
    "modeling_clipmini",
    "clipmini/declared.py",
    "clipmini/names.py",
    "clipmini/files.py",
    "clipmini/html.py",
    "clipmini/store.py",
    "clipmini/trust.py",
    "clipmini/conversion.py",
    "clipmini/recipe_files.py",
    "clipmini/data",
    "clipmini/inference",
    "clipmini/indexing",
    "clipmini/evaluation",
    "clipmini/publishing",
    "training",
    "clipmini",
)
ALL_PYTHON = sorted(
    path for path in ROOT.rglob("*.py") if not {".venv", "build", "runs"} & set(path.relative_to(ROOT).parts)
)


def imported_names(path):
    """Absolute names of all that a file imports, at any depth; relative imports begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def rung_of_file(path):
    """How far down the ladder a file stands."""
    name = path.relative_to(ROOT).as_posix()
    return next(rung for rung, place in enumerate(LADDER) if name == place or name.startswith(f"{place}/"))


def rung_of_module(name):
    """How far down the ladder an imported module stands; None for what is not ours."""
    if name.split(".")[0] not in PACKAGES[:2]:
        return None
    place = name.replace("clipmini.training", "training").replace("clipmini.configuration", "configuration")
    place = place.replace(".", "/")
    if (ROOT / f"{place}.py").exists():
        return rung_of_file(ROOT / f"{place}.py")
    return next(rung for rung, folder in enumerate(LADDER) if f"{place}/".startswith(f"{folder}/"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_folder_imports_only_from_those_above_it(path):
    """Also inside of functions."""
    names, own = set(imported_names(path)), rung_of_file(path)
    assert not {name.split(".")[0] for name in names} & {"tests", "benchmarks", "metrics", "training", "configuration"}
    assert not any(name.startswith("..") for name in names)
    below = {name for name in names if (rung := rung_of_module(name)) is not None and rung > own}
    assert below == set()
    if path.parent.name == "modeling_clipmini":
        third_party = {name.split(".")[0] for name in names if not name.startswith(".")} - set(sys.stdlib_module_names)
        # transformers itself needs numpy; pillow_heif is tried, and may be missing
        assert third_party <= {"torch", "transformers", "timm", "PIL", "numpy", "pillow_heif"}
        assert "pillow_heif" not in get_imports(path)  # which must all be installed where the model is loaded


def test_the_ladder_finds_what_it_is_for():
    assert rung_of_module("clipmini.training.run") > rung_of_module("clipmini.publishing.card")
    assert rung_of_module("clipmini.cli") > rung_of_module("clipmini.training")
    assert rung_of_module("clipmini.files") < rung_of_module("clipmini.data.pairs")
    assert rung_of_module("modeling_clipmini.images_clipmini") == rung_of_module("modeling_clipmini")
    assert rung_of_module("torch.nn") is None


@pytest.mark.parametrize("path", (ROOT / "modeling_clipmini").glob("*.py"), ids=lambda path: path.name)
def test_uploaded_code_survives_transformers_import_scanner(path):
    """transformers finds relative imports by regex over the raw text and copies files flat."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s*(from|import)\s+\.", line):
            assert re.match(r"from \.\w+_clipmini import ", line), line


@pytest.mark.parametrize("name", ["configuration", "processing", "modeling"])
def test_what_transformers_loads_imports_all_that_it_needs_itself(name):
    """Before 5.12 it copies, of a local folder, that file and its own imports, and not what these import."""

    def siblings(name):
        source = (ROOT / "modeling_clipmini" / f"{name}_clipmini.py").read_text(encoding="utf-8")
        return set(re.findall(r"^from \.(\w+)_clipmini import", source, re.MULTILINE))

    assert siblings(name) >= set().union(*map(siblings, siblings(name)))


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_a_name_that_says_something(path):
    assert path.name != "utils.py"


def test_every_photograph_keeps_license_and_source():
    import json

    for split, count in (("train", 168), ("validation", 24), ("test", 32)):
        folder = ROOT / "examples" / "photos" / split
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count
        assert {row["file_name"] for row in rows} == {file.name for file in folder.glob("*.webp")}
        for row in rows:
            assert row["license"] in ("Public Domain", "CC0-1.0")
            assert row["source"].startswith("http") or row["author"]


def test_make_help_is_the_default_goal():
    result = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make demo" in result.stdout
    assert "make test" in result.stdout


@pytest.mark.parametrize("path", (ROOT / ".github").rglob("*.yml"), ids=lambda path: path.name)
def test_issue_forms_are_such_that_github_shows_them(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])


def test_the_citation_is_of_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == clipmini.__version__
    assert citation["license"] == "Apache-2.0"


def test_make_and_ci_name_only_files_that_exist():
    for path in (ROOT / "Makefile", ROOT / ".ci" / "try_wheel"):
        for name in re.findall(r"(?:\.ci|benchmarks|examples)/[\w/.]+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), name
