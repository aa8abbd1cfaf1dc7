"""Rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_clipmini", "training", "inference", "evaluation")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_may_import_whom(path):
    package, names = path.parent.name, set(imported_names(path))
    roots = {name.split(".")[0] for name in names if not name.startswith(".")}
    assert not roots & {"tests", "benchmarks", "metrics", *PACKAGES[1:], "configuration"}
    assert not any(name.startswith("..") for name in names)
    if package == "modeling_clipmini":
        third_party = roots - set(sys.stdlib_module_names)
        assert third_party <= {"torch", "transformers", "timm", "PIL", "numpy"}  # transformers itself needs numpy
    if package == "inference" and path.name != "cli.py":
        assert not any(name.startswith("clipmini.training") for name in names)
    if package == "training":
        used = {name for name in names if name.startswith("clipmini.inference")}
        assert used <= {f"clipmini.inference.{name}" for name in ("encode", "encoders", "images", "trust")}
    if not (package == "evaluation" or path.name == "cli.py"):
        assert not any(name.startswith("clipmini.evaluation") for name in names)


@pytest.mark.parametrize("path", (ROOT / "modeling_clipmini").glob("*.py"), ids=lambda path: path.name)
def test_uploaded_code_survives_transformers_import_scanner(path):
    """transformers finds relative imports by regex over the raw text and copies files flat."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s*(from|import)\s+\.", line):
            assert re.match(r"from \.\w+_clipmini import ", line), line


@pytest.mark.parametrize("name", ["configuration", "processing", "modeling", "towers"])
def test_what_transformers_loads_imports_all_that_it_needs_itself(name):
    """Before 5.12 it copies, of a local folder, that file and its own imports, and not what these import."""

    def siblings(name):
        source = (ROOT / "modeling_clipmini" / f"{name}_clipmini.py").read_text(encoding="utf-8")
        return set(re.findall(r"^from \.(\w+)_clipmini import", source, re.MULTILINE))

    assert siblings(name) >= set().union(*map(siblings, siblings(name)))


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_a_name_that_says_something(path):
    assert path.name != "utils.py"


def test_the_tree_in_the_readme_is_the_tree():
    """Every file of the packages has its line in README, and every file named there exists."""
    tree = re.search(r"```\n(README\.md\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            named.add(name)
        else:
            named.add(folder + name)
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()
    unnamed = {
        str(path.relative_to(ROOT))
        for path in [*SOURCES, *(ROOT / "configuration").rglob("*.yaml")]
        if path.name != "__init__.py" and str(path.relative_to(ROOT)) not in named
    }
    assert unnamed == set()


def test_every_photograph_keeps_licence_and_source():
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
