"""Models of other libraries embed the same once they are converted into clipmini's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Siglip2Config, SiglipTokenizer
from transformers.trainer_utils import align_special_tokens

import clipmini
from clipmini import conversion
from clipmini.conversion import convert, resolve_model
from clipmini.inference.embed import load_model
from clipmini.store import spaces
from hub_repositories import Commit, File, Repository
from loopback_hub import running_hub
from peer_models import save_bert, save_clip, save_open_clip, save_siglip

# Of few and of many tokens, more than any of the models read; an odd space, capitals and typographic quotes
CAPTIONS = ["a", "Two  dogs\trun", "a cat\u2019s eye", "one after another " * 20]
ENTITIES = ["black &amp; white", "&quot;x&quot; &lt; y", "it&#39;s"]
SIZES = [(32, 32), (64, 64), (90, 37), (201, 120), (300, 500)]
BOUND = 1e-4  # of a logit


@pytest.fixture(scope="session")
def images():
    """Photograph-like noise, of several shapes."""
    draw = np.random.default_rng(0).integers
    return [Image.fromarray(draw(0, 256, (7, 9, 3), np.uint8)).resize(size, Image.BICUBIC) for size in SIZES]


def logits_of(model, images):
    with torch.no_grad():
        return model(**model.processor(images=images, text=CAPTIONS)).logits_per_image


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("save", "changes"),
    [
        (save_clip, {}),
        (save_clip, {"hidden_act": "gelu", "intermediate_size": 37, "num_attention_heads": 4}),
        (save_clip, {"eos_token_id": 2}),  # of configs from before transformers 4.32
        (save_siglip, {}),
    ],
)
def test_a_model_of_transformers(save, changes, images, tmp_path):
    save(tmp_path / "peer", **changes)
    peer, processor = (
        AutoModel.from_pretrained(tmp_path / "peer").eval(),
        AutoProcessor.from_pretrained(tmp_path / "peer"),
    )
    padding = "max_length" if save is save_siglip else True
    inputs = processor(
        images=images, text=CAPTIONS, padding=padding, truncation=True, max_length=12, return_tensors="pt"
    )
    if save is save_siglip:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        expected = peer(**inputs).logits_per_image
    model = convert(tmp_path / "peer")
    assert (logits_of(model, images) - expected).abs().max() < BOUND
    assert torch.equal(logits_of(saved_and_loaded(model, tmp_path / "own"), images), logits_of(model, images))
    assert expected.std(dim=0).min() > 100 * BOUND  # the models tell images apart
    assert expected.std(dim=1).min() > 100 * BOUND


@pytest.mark.parametrize("name", ["ViT-B-32", "timm", "MobileCLIP2-S0"])
def test_a_model_of_open_clip(name, images, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    save_open_clip(tmp_path / "peer", name)
    peer, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'peer'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'peer'}")
    pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        features = (
            peer.eval().encode_image(pixels, normalize=True),
            peer.encode_text(tokenizer(CAPTIONS), normalize=True),
        )
        expected = peer.logit_scale.exp() * features[0] @ features[1].T
    model = convert(f"open_clip:local-dir:{tmp_path / 'peer'}")
    inputs = model.processor(text=CAPTIONS)
    with torch.no_grad():
        found = model(pixel_values=pixels, **inputs).logits_per_image
        theirs = peer.encode_text(tokenizer(ENTITIES), normalize=True).numpy()
    assert np.abs(model.encode_text(ENTITIES) - theirs).max() < BOUND
    assert (found - expected).abs().max() < BOUND
    # Stock image processors round another way, and where an odd number of pixels is cut off, cut another side.
    own = model.processor(images=images)["pixel_values"]
    assert (own - pixels).abs().mean() < 0.02
    before = logits_of(model, images)
    align_special_tokens(model, model.processor)  # as Trainer does
    assert torch.equal(logits_of(saved_and_loaded(model, tmp_path / "own"), images), before)
    assert expected.std(dim=0).min() > 100 * BOUND
    assert expected.std(dim=1).min() > 100 * BOUND


def test_a_model_of_sentence_transformers(clip_folder, images, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    peer = library.SentenceTransformer(modules=[modules.CLIPModel(str(clip_folder))])
    peer.save(str(tmp_path / "peer"))
    model = convert(tmp_path / "peer")
    for ours, theirs in (
        (model.encode_image(images), peer.encode(images)),
        (model.encode_text(CAPTIONS[:2]), peer.encode(CAPTIONS[:2])),
    ):
        assert np.abs(ours - theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).max() < 1e-5
    peer.prompts, peer.default_prompt_name = {"query": "a photo of "}, "query"
    peer.save(str(tmp_path / "prompted"))
    with pytest.raises(ValueError, match="puts the prompt 'a photo of ' before each caption"):
        convert(tmp_path / "prompted")


def test_it_is_converted_once_into_the_cache(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "cache"))
    peer = shutil.copytree(clip_folder, tmp_path / "peer")
    random_state = torch.get_rng_state()
    folder = resolve_model(peer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert resolve_model(folder) == folder  # a clipmini model
    assert [space.description for space in spaces()] == [f"model {peer}"]
    weights = Path(folder, "model.safetensors")
    written, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert (resolve_model(peer), weights.stat().st_mtime_ns) == (folder, written)

    weights.write_bytes(b"damaged")
    assert (resolve_model(peer), weights.read_bytes()) == (folder, content)
    (peer / "config.json").touch()  # another model, for all that is known without reading its weights
    assert resolve_model(peer) != folder


def test_a_model_that_changes_in_its_place_is_converted_again(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "cache"))
    for one in ("one", "other"):
        monkeypatch.chdir(save_clip(tmp_path / one / "snapshots" / "peer").parents[1])
        config = save_open_clip(Path("peer")) / "open_clip_config.json"
        config_name = Path("configs", "tiny.json")
        config_name.parent.mkdir()
        config_name.write_text(json.dumps(json.loads(config.read_text())["model_cfg"]))
        open_clip.add_model_config(config_name)
        Path("weights.safetensors").write_bytes(Path("peer", "open_clip_model.safetensors").read_bytes())
        names = {
            "snapshots/peer": "config.json",  # as folders in the Hub's cache are called, which do not change
            "open_clip:local-dir:peer": "open_clip_config.json",
            "open_clip:tiny/weights.safetensors": "weights.safetensors",
        }
        for name, file in names.items():
            first = resolve_model(name)
            assert resolve_model(name) == first
            folder = Path(name.removeprefix("open_clip:").removeprefix("local-dir:").removeprefix("tiny/"))
            os.utime(folder / file if folder.is_dir() else folder, (1, 1))
            assert resolve_model(name) != first
    assert len(spaces()) == 2 * 2 * 3  # a path means another model in another folder


def save_changed(save, folder, file, change):
    """Save a model whose JSON file is changed afterwards."""
    path = save(folder) / file
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


def save_clip_with_word(folder):
    """A model of older transformers whose tokenizer has learned a word."""
    save_clip(folder, eos_token_id=2, vocab_size=55)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<toy>"])
    tokenizer.save_pretrained(folder)
    return folder


REFUSED = {
    "pools captions at the highest id": save_clip_with_word,
    "holds a model of type 'bert'": save_bert,
    "holds a model of type 'siglip2'": lambda folder: Siglip2Config().save_pretrained(folder) or folder,
    "has shape (12, 16), and its configuration needs (12, 18)": lambda folder: save_changed(
        save_clip, folder, "config.json", lambda config: config["text_config"].update(hidden_size=18)
    ),
    "layer_norm_eps=0.001": lambda folder: save_changed(
        save_clip, folder, "config.json", lambda config: config["vision_config"].update(layer_norm_eps=1e-3)
    ),
    "hidden_act='relu'": lambda folder: save_changed(
        save_clip, folder, "config.json", lambda config: config["vision_config"].update(hidden_act="relu")
    ),
    "its prepared images would differ by 0.0": lambda folder: save_changed(
        save_clip,
        folder,
        "processor_config.json",
        lambda config: config["image_processor"].update(rescale_factor=1 / 256),
    ),
    "its prepared images would differ by 4": lambda folder: save_changed(
        save_clip, folder, "processor_config.json", lambda config: config["image_processor"].update(do_rescale=False)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(reason, tmp_path):
    folder = REFUSED[reason](tmp_path / "peer")
    for call in (convert, clipmini.load, resolve_model):
        with pytest.raises(ValueError, match=re.escape(reason)) as raised:
            call(folder)
        assert str(folder) in str(raised.value)


def test_models_of_open_clip_that_cannot_be_converted(tmp_path):
    pytest.importorskip("open_clip")
    for name in ("open_clip:ViT-B-32", "open_clip:local-dir:"):
        with pytest.raises(ValueError, match=rf"{name} .*names no weights; write open_clip:NAME/PRETRAINED"):
            convert(name)
    folder = save_changed(
        save_open_clip,
        tmp_path / "longest",
        "open_clip_config.json",
        lambda config: config["preprocess_cfg"].update(resize_mode="longest"),
    )
    with pytest.raises(ValueError, match=r"resize_mode is 'longest'; use shortest or squash"):
        convert(folder)
    pickled = save_open_clip(tmp_path / "pickled")
    (pickled / "open_clip_model.safetensors").rename(pickled / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="it has no weights in safetensors, and pickled ones can run code"):
        convert(pickled)
    with pytest.raises(ValueError, match="its image tower is a ModifiedResNet"):
        convert(save_open_clip(tmp_path / "resnet", "ResNet"))


def test_a_conversion_that_differs_is_refused(clip_folder, monkeypatch):
    monkeypatch.setitem(conversion.ACTIVATIONS, "quick_gelu", "gelu")
    with pytest.raises(ValueError, match=r"its image embeddings would differ by 0\.\d+"):
        convert(clip_folder)


def test_a_folder_of_its_own_is_a_whole_model(clip_folder, images, tmp_path):
    peer = shutil.copytree(clip_folder, tmp_path / "peer")
    (peer / "README.md").write_text("---\nlicense: mit\nbase_model: some/one\n---\n")
    model = clipmini.convert(peer, tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "license: mit" in card
    assert "some/one" in card
    assert str(tmp_path) not in card
    assert "**Made from:** peer, converted by clipmini and not trained further" in card
    assert "## Training" not in card
    with pytest.raises(ValueError, match=r"holds a model of another library; convert it.* --out NEW_FOLDER"):
        clipmini.push(peer, "name/own", dry_run=True)
    pushed = clipmini.push(tmp_path / "own", "name/own", dry_run=True)
    assert "model.safetensors" in pushed.sizes
    assert np.array_equal(clipmini.load(tmp_path / "own", "cpu").encode_image(images), model.encode_image(images))
    with pytest.raises(ValueError, match="exists: remove it, or name another"):
        clipmini.convert(peer, tmp_path / "own")
    with pytest.raises(ValueError, match="is a clipmini model already"):
        clipmini.convert(tmp_path / "own")


def test_the_tokenizer_of_the_first_siglip(tmp_path):
    """In transformers it is in Python, and needs sentencepiece; a converted model does not."""
    library = pytest.importorskip("sentencepiece")
    sentences = ["two dogs run over the grass", "a man in a red hat", "the old bridge, at night", "an island far away"]
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 40, "hard_vocab_limit": False}
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20), model_prefix=str(tmp_path / "peer"), **options
    )
    peer = SiglipTokenizer(vocab_file=str(tmp_path / "peer.model"), model_max_length=16)
    own = conversion._siglip_tokenizer(peer)
    own.save_pretrained(tmp_path / "own")
    texts = [*sentences, "A Man's snake_case,  3 dogs!", "caf\u00e9 \u00bd", "x", ""]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "own")
    for text in texts:
        assert loaded(text, truncation=True)["input_ids"] == peer(text, truncation=True)["input_ids"], text
    padded = {"padding": "max_length", "truncation": True}
    assert loaded(texts, **padded)["input_ids"] == peer(texts, **padded)["input_ids"]


def test_models_on_the_hub(clip_folder, tmp_path, monkeypatch):
    """Of transformers, and of sentence-transformers, which keeps the same in a folder inside."""
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    with running_hub() as hub:
        files = {path.name: File(path.read_bytes(), False) for path in Path(clip_folder).iterdir() if path.is_file()}
        inner = {f"0_CLIPModel/{name}": file for name, file in files.items()}
        for name, content in {
            "openai/clip": files,
            "theirs/clip": {**inner, "modules.json": File(json.dumps(modules).encode(), False)},
        }.items():
            hub.models[name] = Repository(name)
            hub.models[name].add_commit("main", Commit("model", content))
        embed = "clipmini.load(name, 'cpu').encode_text(['a', 'b']).tolist()"
        program = f"import sys, clipmini; print(*[{embed} for name in sys.argv[1:]])"
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "hf"), "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-c", program, "openai/clip", "theirs/clip"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        again = subprocess.run(command, capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "1"})
    expected = convert(clip_folder).encode_text(["a", "b"]).tolist()
    assert done.stdout.strip() == f"{expected} {expected}"
    assert again.stdout == done.stdout, again.stderr
    assert "is converted" in done.stderr
    assert "is converted" not in again.stderr  # offline, it is the same model
