"""Fixtures that every folder uses: tiny random models, made once, and nothing from any network."""

import os

# Before anything imports datasets or transformers: a test must not find, or leave, anything in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from clipmini.training.build import character_tokenizer
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor

TINY_TEXT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}


def make_tiny_config(**options):
    """A config with half a million parameters: timm's test_resnet and two layers of DistilBERT."""
    text_config = {**TINY_TEXT, "vocab_size": len(character_tokenizer())}
    defaults = {"vision_config": {"architecture": "test_resnet"}, "text_config": text_config, "projection_dim": 16}
    return ClipMiniConfig(**{**defaults, **options})


@pytest.fixture(scope="session")
def tiny_config():
    return make_tiny_config


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return ClipMiniModel(make_tiny_config()).eval()


@pytest.fixture
def tiny_processor():
    return ClipMiniProcessor.from_towers(make_tiny_config(), character_tokenizer())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny model with its processor, as a user would have it on disk. Read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    ClipMiniModel(make_tiny_config()).save_pretrained(folder)
    ClipMiniProcessor.from_towers(make_tiny_config(), character_tokenizer()).save_pretrained(folder)
    return folder
