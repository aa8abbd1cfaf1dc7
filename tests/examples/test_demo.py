"""The second half of `make demo`, on the tiny model."""

import runpy
import shutil
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_searches_and_draws(tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "runs" / "demo" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which the demo sets where stderr is a file; here, it is put back
    runpy.run_path(str(DEMO), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith('"people making music": ')
    with Image.open("runs/demo/search.png") as drawing:
        assert drawing.width > 1000
