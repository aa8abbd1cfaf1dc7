from pathlib import Path

import pytest

from clipmini.training.folder import save_model_folder


def test_no_half_of_a_folder_is_ever_seen(tiny_model, tiny_processor, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_model_folder(tiny_model, tiny_processor, folder)
    before = (folder / "config.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tiny_processor), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model_folder(tiny_model, tiny_processor, folder)
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_left_alone(tiny_model, tiny_processor, tmp_path):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "model"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    save_model_folder(tiny_model, tiny_processor, link)
    assert (link / "config.json").exists()
    assert list(elsewhere.iterdir()) == []
