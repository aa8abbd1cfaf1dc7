"""Every use of a model chooses its device as torch does. A Mac's GPU has no float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipmini
from clipmini.inference.embed import choose_device
from clipmini.inference.encoders import load_encoder


def test_a_mac_uses_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    assert choose_device() == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")


def test_without_an_accelerator_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert choose_device() == torch.device("cpu")


def test_models_of_every_library_go_there(monkeypatch, tiny_folder, clip_folder):
    load_encoder(clip_folder)  # is converted, on the CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    devices = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: devices.append(device) or self)
    clipmini.load(tiny_folder)  # as `serve` does
    for folder in (tiny_folder, clip_folder):  # as search, classify, evaluate and teach do
        load_encoder(folder)
    assert devices == [torch.device("mps")] * 3


@pytest.mark.parametrize("device", ["foo", "cuda:99", "", 3.5])
def test_what_is_no_device_is_refused_in_one_sentence(tiny_folder, device):
    with pytest.raises(ValueError, match=r"device=.* cannot be used: .*\. Use cpu"):
        clipmini.load(tiny_folder, device)


class NoFloat64(TorchDispatchMode):
    """Fails at the first operation that makes a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        assert not any(isinstance(item, torch.Tensor) and item.dtype == torch.float64 for item in made), func
        return result


def test_no_float64_reaches_the_device(tiny_folder, clip_folder, folder):
    for model in (tiny_folder, clip_folder):
        encoder = load_encoder(model)
        with NoFloat64():
            clipmini.search(encoder, folder, "a red image")
            clipmini.classify(encoder, sorted(folder.glob("*.png")), ["red", "blue"])
            encoder.encode_images([folder / "red.png"])
