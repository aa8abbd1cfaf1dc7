import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmini.inference.encoders import load_encoder
from clipmini.publishing import folder as folders
from clipmini.publishing.folder import save_model_folder
from stranger import run_as_stranger


def test_no_half_of_a_folder_is_ever_seen(tiny_model, tiny_processor, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_model_folder(tiny_model, folder)
    before = (folder / "config.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tiny_processor), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model_folder(tiny_model, folder)
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_left_alone(tiny_model, tiny_processor, tmp_path):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "model"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    save_model_folder(tiny_model, link)
    assert (link / "config.json").exists()
    assert list(elsewhere.iterdir()) == []


def test_a_notice_says_whose_the_parts_are_each_once(tiny_model, tiny_processor, tmp_path):
    tower, folder, second = tmp_path / "tower", tmp_path / "model", tmp_path / "second"
    tower.mkdir()
    (tower / "NOTICE").write_text("The tower is theirs.\n")
    save_model_folder(tiny_model, folder, made_of=[str(tower), "org/of-the-hub"])
    save_model_folder(tiny_model, second, made_of=[str(folder), str(tower)])
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith("The code in this folder")
    assert notice.endswith("\n\nThe tower is theirs.\n")
    assert (second / "NOTICE").read_text() == notice


def test_it_says_which_packages_it_needs(tiny_model, tiny_processor, tmp_path):
    save_model_folder(tiny_model, tmp_path / "model")
    lines = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    assert [re.match(r"[a-z]+", line)[0] for line in lines] == list(folders.NEEDED_BY_THE_MODEL)
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)


def test_the_handler_comes_along(tiny_model, tiny_processor, tmp_path):
    save_model_folder(tiny_model, tmp_path / "model")
    assert (tmp_path / "model" / "handler.py").read_bytes() == folders.HANDLER.read_bytes()
    assert b"class EndpointHandler" in folders.HANDLER.read_bytes()


def test_what_sentence_transformers_reads_hides_no_clipmini_model(tiny_model, tiny_processor, tmp_path):
    save_model_folder(tiny_model, tmp_path / "model")
    assert (tmp_path / "model" / "modules.json").exists()
    assert load_encoder(tmp_path / "model").about()["kind"] == "ClipMiniModel"


@pytest.mark.slow
def test_it_is_a_model_of_sentence_transformers(tiny_model, tiny_processor, tmp_path):
    """Where clipmini cannot be imported, with one copy of the weights."""
    texts = ["a cat", "a longer caption of a dog", "many words " * 100]
    images = [Image.linear_gradient("L").resize((90, 60)), Image.new("RGBA", (50, 50), (200, 0, 0, 0))]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    save_model_folder(tiny_model, tmp_path / "model")
    tiny_model.processor = tiny_processor
    expected = tiny_model.encode_text(texts), tiny_model.encode_image(images)
    code = """
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("model", trust_remote_code=True, device="cpu")
texts, images = model.encode(json.loads(sys.argv[1])), model.encode([Image.open("0.png"), Image.open("1.png")])
print(json.dumps([texts.tolist(), images.tolist(), model.similarity(images, texts).tolist()]))
"""
    output = run_as_stranger(code, tmp_path, json.dumps(texts)).stdout
    embeds = [np.array(value) for value in json.loads(output.splitlines()[-1])]
    assert np.allclose(embeds[0], expected[0], atol=1e-5)
    assert np.allclose(embeds[1], expected[1], atol=1e-5)
    assert np.allclose(embeds[2], expected[1] @ expected[0].T, atol=1e-5)
    assert [file.name for file in (tmp_path / "model").rglob("*.safetensors")] == ["model.safetensors"]
