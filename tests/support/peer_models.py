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

VISION = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"max_position_embeddings": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = {"hidden_size": 16, "intermediate_size": 32}


def shake(model, scale=0.2):
    """Make random weights so large that every layer matters, as in a trained model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit_"):
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def letter_tokenizer():
    """CLIP's own tokenizer with single letters for a vocabulary, and as on the Hub with no maximum length set."""
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {piece: index for index, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[])


def save_clip(folder, **changes):
    torch.manual_seed(0)
    text = {**TEXT, **WIDTH, "vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, **changes}
    config = CLIPConfig(vision_config={**VISION, **WIDTH, **changes}, text_config=text, projection_dim=8)
    shake(CLIPModel(config)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, letter_tokenizer()).save_pretrained(folder)
    return folder


def save_siglip(folder):
    torch.manual_seed(0)
    text = {**TEXT, **WIDTH, "vocab_size": 54, "projection_size": 16}
    shake(SiglipModel(SiglipConfig(vision_config={**VISION, **WIDTH}, text_config=text))).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), letter_tokenizer()).save_pretrained(folder)
    return folder


def save_bert(folder):
    """A model that embeds captions alone."""
    bert = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, vocab_size=54, **WIDTH))
    bert.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


OPEN_CLIP_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
OPEN_CLIP_VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
# Small models with the parts of ViT-B-32, of a CLIP with a tower of timm, and of MobileCLIP2-S0.
OPEN_CLIP_CONFIGS = {
    "ViT-B-32": {"embed_dim": 8, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": OPEN_CLIP_TEXT},
    "timm": {
        "embed_dim": 8,
        "quick_gelu": True,
        "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_proj": "linear", "image_size": 64},
        "text_cfg": OPEN_CLIP_TEXT,
    },
    "MobileCLIP2-S0": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": 256},
        "text_cfg": {**OPEN_CLIP_TEXT, "no_causal_mask": True},
    },
    "ResNet": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": OPEN_CLIP_TEXT,
    },
}


def save_open_clip(folder, name="ViT-B-32"):
    """A folder as open_clip's `local-dir:` reads it."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = OPEN_CLIP_CONFIGS[name]
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    model = (open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP)(**arguments)
    shake(model, 0.05 if name == "MobileCLIP2-S0" else 0.2)  # its many layers would enlarge every rounding
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one batch, in training mode, gives it the statistics of its input
    with torch.no_grad():
        model.visual(torch.randn(4, 3, *2 * [config["vision_cfg"]["image_size"]]))
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
