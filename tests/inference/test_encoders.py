"""Any model, by its name or loaded already, embeds through one interface."""

import shutil

import numpy as np
import pytest
import torch

from clipmini.inference.embed import DualEncoder, load_model
from clipmini.inference.encoders import load_encoder, load_encoders
from modeling_clipmini.images_clipmini import ImageError, read_image

CAPTIONS = ["a red square", "disc", "a bar in blue, much longer than the model takes"]


def test_clipmini(tiny_folder, toy_pairs):
    encoder = load_encoder(tiny_folder)
    model = load_model(tiny_folder)
    for other in (load_encoder(model), DualEncoder(model)):
        assert torch.equal(encoder.encode_images(toy_pairs["image"]), other.encode_images(toy_pairs["image"]))
    images = [read_image(image) for image in toy_pairs["image"]]
    assert np.allclose(encoder.encode_images(images), model.encode_image(images), atol=1e-6)
    assert np.allclose(encoder.encode_texts(CAPTIONS), model.encode_text(CAPTIONS), atol=1e-6)
    assert load_encoder(encoder) is encoder
    assert encoder.name == tiny_folder.parent.name
    assert encoder.logit_scale == pytest.approx(model.get_logit_scale().item())


def test_an_unreadable_image_is_named_in_the_error(clip_folder, toy_pairs):
    with pytest.raises(ImageError, match="image 2: "):
        load_encoder(clip_folder).encode_images([toy_pairs[0]["image"], {"bytes": b"no", "path": None}])


def test_encoders_of_the_same_name_get_their_paths_as_names(clip_folder, siglip_folder, tmp_path):
    folders = [tmp_path / run / "model" for run in ("one/first", "other/first")]
    for folder, model in zip(folders, (clip_folder, siglip_folder), strict=True):
        folder.parent.mkdir(parents=True)
        shutil.copytree(model, folder)
    assert [encoder.name for encoder in load_encoders(*folders)] == [str(folder) for folder in folders]
    assert [encoder.name for encoder in load_encoders(folders[0], clip_folder)] == ["first", clip_folder.name]
