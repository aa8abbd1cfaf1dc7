"""Tiny random models of other libraries, saved as their users have them; import as `peer_models`."""

import json
import string

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

VISION = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"max_position_embeddings": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDTH = {"hidden_size": 16, "intermediate_size": 32}


def letter_tokenizer():
    """CLIP's own tokenizer with single letters for a vocabulary, and as on the Hub with no maximum length set."""
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {piece: index for index, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[])


def save_clip(folder):
    torch.manual_seed(0)
    text = {**TEXT, **WIDTH, "vocab_size": 54, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(vision_config={**VISION, **WIDTH}, text_config=text, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, letter_tokenizer()).save_pretrained(folder)
    return folder


def save_siglip(folder):
    torch.manual_seed(0)
    text = {**TEXT, **WIDTH, "vocab_size": 54, "projection_size": 16}
    SiglipModel(SiglipConfig(vision_config={**VISION, **WIDTH}, text_config=text)).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), letter_tokenizer()).save_pretrained(folder)
    return folder


def save_bert(folder):
    """A model that embeds captions alone."""
    bert = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, vocab_size=54, **WIDTH))
    bert.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def save_open_clip(folder):
    """A folder as open_clip's `local-dir:` reads it."""
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
