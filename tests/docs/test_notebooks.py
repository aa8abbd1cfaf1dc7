"""The notebooks of the tutorial: they run as they are, and what is stored in them can be read anywhere."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from pages import NOTEBOOKS

MAX_BYTES = 1_500_000  # GitHub shows larger ones slowly, or not at all
MACHINE = re.compile(r"/(tmp|work|root|home|Users|usr|opt)/|[A-Z]:\\\\Users")
NOISE = re.compile(r"\bwarning\b|\d+%\|", re.IGNORECASE)  # and progress bars

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_it_is_stored_with_its_outputs_and_without_traces_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < MAX_BYTES
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > len(cells) / 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        texts = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
        shown = re.sub(
            r"data:image/\w+;base64,[\w+/=]+", "", "".join(map(str, [output.get("text", ""), *texts.values()]))
        )
        assert not MACHINE.search(shown), shown
        assert not NOISE.search(shown), shown


@pytest.mark.slow
@each_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    """From its own folder, as Jupyter does; what it writes, it writes elsewhere."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(path.parent.iterdir())
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    assert set(path.parent.iterdir()) == before
