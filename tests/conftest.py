"""Fixtures that every folder uses: tiny random models, made once, and nothing from any network."""

import io
import os
import shutil

# Before anything imports datasets or transformers: a test must not find, or leave, anything in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and workers of pytest-xdist that share cores would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from PIL import Image, ImageDraw

from clipmini import names
from clipmini.publishing.card import render_card
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import character_tokenizer
from clipmini.training.recipes import describe_stage
from loopback_hub import TOKEN, running_hub
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from peer_models import save_clip, save_siglip

# On a GPU, cuDNN would round the inputs of convolutions to 10 bits, and tests that compare numbers would see it.
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("highest")

TINY_TEXT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}


def make_tiny_config(**options):
    """A config with half a million parameters: timm's test_resnet and two layers of DistilBERT."""
    text_config = {**TINY_TEXT, "vocab_size": len(character_tokenizer())}
    defaults = {"vision_config": {"architecture": "test_resnet"}, "text_config": text_config, "projection_dim": 16}
    return ClipMiniConfig(**{**defaults, **options})


@pytest.fixture(scope="session")
def tiny_config():
    return make_tiny_config


def set_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path_factory.mktemp("clipmini")))


@pytest.fixture(scope="session", autouse=True)
def cache_of_shared_fixtures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        set_caches(patch, tmp_path_factory)
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    set_caches(monkeypatch, tmp_path_factory)


@pytest.fixture
def tiny_processor():
    return ClipMiniProcessor.from_towers(make_tiny_config(), character_tokenizer())


@pytest.fixture
def tiny_model(tiny_processor):
    torch.manual_seed(0)
    model = ClipMiniModel(make_tiny_config()).eval()
    model.processor = tiny_processor
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny model with its processor, as a user would have it on disk. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    ClipMiniModel(make_tiny_config()).save_pretrained(folder)
    ClipMiniProcessor.from_towers(make_tiny_config(), character_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def make_card(tiny_config):
    """Make a card of the tiny model as a run writes it, without figures."""
    stages = [describe_stage("", ClipMiniTrainingArguments(output_dir="run", use_cpu=True))]

    def make(license="apache-2.0", results=None):
        return render_card(
            "tiny", tiny_config(), source="photos", license=license, parts=[], stages=stages, results=results or {}
        )

    return make


@pytest.fixture
def pushable_folder(tiny_folder, make_card, tmp_path):
    """A copy of the saved tiny model with a card, which may be changed and pushed."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(tiny_folder, folder)
    make_card().save(folder / "README.md")
    return folder


@pytest.fixture(autouse=True)
def hub_is_asked_anew():
    """Each test has a Hub of its own."""
    names._find_on_hub.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback that this process takes for the only one; what it cannot answer fails the test."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # it remembers proxies
        yield hub
        close_session()
        assert hub.unknown == []


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of transformers. Read only."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """A tiny SigLIP of transformers. Read only."""
    return save_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture
def class_folder(tmp_path):
    """Ten images of each of three classes, a folder for each."""
    for number, (name, color) in enumerate((("red_fox", "red"), ("tree", "green"), ("sea", "blue"))):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for index in range(10):
            image = Image.new("RGB", (40, 32), color)
            ImageDraw.Draw(image).rectangle((index, 2 * number, index + 8, 20), fill="white")
            image.save(folder / f"{index}.png")
    return tmp_path / "classes"


COLORS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 210), "white": (245, 245, 245)}
SHAPES = ("square", "disc", "bar")


@pytest.fixture(scope="session")
def toy_pairs():
    """Twelve images of colored shapes with two captions each, as `load_pairs` gives them."""
    rows = []
    for image_id, (color, shape) in enumerate((color, shape) for color in COLORS for shape in SHAPES):
        image = Image.new("RGB", (80, 64), "black")
        box = {"square": (20, 12, 60, 52), "disc": (20, 12, 60, 52), "bar": (5, 28, 75, 36)}[shape]
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=COLORS[color])
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append(
            {
                "image": {"bytes": file.getvalue(), "path": None},
                "captions": [f"a {color} {shape}", f"{shape} in {color}"],
                "image_id": image_id,
            }
        )
    features = Features(
        {"image": ImageFeature(decode=False), "captions": List(Value("string")), "image_id": Value("int64")}
    )
    return Dataset.from_list(rows, features=features)
