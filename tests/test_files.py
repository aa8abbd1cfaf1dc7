import platform
from pathlib import Path

import torch

from clipmini import files
from clipmini.files import run_of, versions


def test_versions_are_those_that_are_installed(monkeypatch):
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == platform.python_version()
    assert {"clipmini", "torchvision", "transformers", "timm", "datasets", "accelerate"} <= set(found)
    assert found["cpu_threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) for value in found.values())
    assert not any(platform.node() in value for value in found.values() if platform.node())
    monkeypatch.setattr(files, "PACKAGES", ("torch", "surely-not-installed"))
    assert "surely-not-installed" not in versions()


def test_the_run_of_a_model_is_found_from_inside_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe_as_run.yaml").touch()
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert run_of(Path()) == run_of(Path("../model")).resolve() == tmp_path / "run"
    assert run_of(tmp_path / "run") is None
