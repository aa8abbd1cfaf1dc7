"""Models of other libraries embed the same through our interface as on their own."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, SiglipImageProcessor, SiglipModel

from clipmini.inference.embed import as_encoder, load_model
from clipmini.inference.encoders import load_encoder, load_encoders
from modeling_clipmini.images_clipmini import ImageError, read_image
from peer_models import letter_tokenizer, save_bert, save_open_clip

CAPTIONS = ["a red square", "disc", "a bar in blue, much longer than the model takes"]


def test_clipmini(tiny_folder, toy_pairs):
    encoder = load_encoder(tiny_folder)
    model = load_model(tiny_folder)
    for other in (load_encoder(model), as_encoder(model)):
        assert torch.equal(encoder.encode_images(toy_pairs["image"]), other.encode_images(toy_pairs["image"]))
    images = [read_image(image) for image in toy_pairs["image"]]
    assert np.allclose(encoder.encode_images(images), model.encode_image(images), atol=1e-6)
    assert np.allclose(encoder.encode_texts(CAPTIONS), model.encode_text(CAPTIONS), atol=1e-6)
    assert load_encoder(encoder) is encoder
    assert (encoder.name, encoder.kind) == (tiny_folder.parent.name, "ClipMiniModel")
    assert encoder.logit_scale == pytest.approx(model.get_logit_scale().item())


def test_clip(clip_folder, toy_pairs):
    encoder = load_encoder(clip_folder)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(
        images=[read_image(image) for image in toy_pairs["image"]],
        text=CAPTIONS,
        truncation=True,
        padding=True,
        max_length=12,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(encoder.encode_images(toy_pairs["image"], batch_size=5), expected.image_embeds)
    torch.testing.assert_close(encoder.encode_texts(CAPTIONS, batch_size=2), expected.text_embeds)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.kind == "CLIPModel"


def test_siglip_gets_captions_padded_to_full_length_without_a_mask(siglip_folder):
    embeds = load_encoder(siglip_folder).encode_texts(["a", "red"])
    ids = letter_tokenizer()("red", padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = SiglipModel.from_pretrained(siglip_folder).eval().get_text_features(ids).pooler_output
    torch.testing.assert_close(embeds[1:], normalize(expected, dim=-1))


def test_open_clip(toy_pairs, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{save_open_clip(tmp_path / 'peer')}"
    encoder = load_encoder(f"open_clip:{name}")
    model, transform = open_clip.create_model_from_pretrained(name)
    pixels = torch.stack([transform(read_image(image)) for image in toy_pairs["image"]])
    with torch.no_grad():
        images = model.eval().encode_image(pixels, normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)
    torch.testing.assert_close(encoder.encode_images(toy_pairs["image"], batch_size=5), images)
    torch.testing.assert_close(encoder.encode_texts(CAPTIONS), texts)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_sentence_transformers(clip_folder, toy_pairs, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model = library.SentenceTransformer(modules=[modules.CLIPModel(str(clip_folder))])
    model.save(str(tmp_path / "peer"))
    encoder = load_encoder(tmp_path / "peer")
    assert (encoder.kind, encoder.logit_scale) == ("sentence-transformers", None)
    images, texts = encoder.encode_images(toy_pairs["image"], batch_size=5), encoder.encode_texts(CAPTIONS[:2])
    opened = [read_image(image) for image in toy_pairs["image"]]
    torch.testing.assert_close(images, normalize(torch.tensor(model.encode(opened)), dim=-1))
    torch.testing.assert_close(texts, normalize(torch.tensor(model.encode(CAPTIONS[:2])), dim=-1))


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


def test_a_model_that_is_no_dual_encoder_is_refused(tmp_path, siglip_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a BertModel.*dual encoder"):
        load_encoder(save_bert(tmp_path / "bert"))
    for cls in (CLIPImageProcessor, SiglipImageProcessor):
        monkeypatch.setattr(cls, "model_input_names", ["pixel_values", "pixel_attention_mask"])
    with pytest.raises(ValueError, match=r"pixel_attention_mask.*fixed image size"):
        load_encoder(siglip_folder)


def test_open_clip_needs_the_name_of_weights():
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32 names no weights; write open_clip:NAME/PRETRAINED"):
        load_encoder("open_clip:ViT-B-32")
