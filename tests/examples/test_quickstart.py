"""The shortest example, on a tiny model."""

import runpy
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_it_searches_measures_and_classifies(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), str(tiny_folder)])
    runpy.run_path(str(QUICKSTART), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("<retrieval of ")
    assert lines[4] in ("a fish", "a horse")
