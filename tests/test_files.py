import platform

import torch

from clipmini import files
from clipmini.files import versions


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
