"""Models of other libraries, converted into clipmini's: how far do their logits differ?

    python benchmarks/conversion.py   # minutes; needs open_clip

Models with the architectures of well-known ones, in their real size, but with random weights, since those of the Hub
are no part of this repository. Each is saved as its library saves it, converted, and compared on all test photographs,
which have many shapes, and their captions: once on the same pixels, and once each with its own preparation of images.
The weights are spread so wide that the logits of different pairs differ by whole points; a trained model's do, too.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoProcessor,
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

from clipmini.conversion import convert
from measuring import PHOTOS, versions, write_between

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# By the name of a model of this architecture: changes to the vision and to the text tower of its config.
TRANSFORMERS_MODELS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": (CLIPModel, {}, {}),
    "openai/clip-vit-large-patch14": (
        CLIPModel,
        {**LARGE, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "google/siglip-base-patch16-224": (SiglipModel, {}, {}),
}
OPEN_CLIP_MODELS = ("ViT-B-32", "ViT-B-16-quickgelu", "convnext_base_w", "MobileCLIP-B", "MobileCLIP2-S0")
SPREAD = 0.01  # standard deviation of what is added to the random weights
TOKENIZER = SimpleTokenizer()  # the vocabulary of CLIP, which open_clip brings along


def load_photos() -> tuple[list[Image.Image], list[str]]:
    """Return the test photographs and their captions."""
    folder = PHOTOS / "test"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Image.open(folder / row["file_name"]).convert("RGB") for row in rows], [row["caption"] for row in rows]


def spread(model: nn.Module, pixels: Tensor) -> None:
    """Make random weights matter, and give each BatchNorm the statistics of its input."""
    for name, parameter in model.named_parameters():
        if not name.startswith("logit_"):
            parameter.add_(SPREAD * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    if hasattr(model, "encode_image"):
        model.train().encode_image(pixels)
    model.eval()


def save_transformers(name: str, folder: Path) -> None:
    """Save a random model of transformers as its users have it."""
    kind, vision, text = TRANSFORMERS_MODELS[name]
    vocab = {piece.replace("_of_text", "oftext"): index for piece, index in TOKENIZER.encoder.items()}
    vocab = {piece.replace("<startoftext>", "<|startoftext|>"): index for piece, index in vocab.items()}
    vocab = {piece.replace("<endoftext>", "<|endoftext|>"): index for piece, index in vocab.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(TOKENIZER.bpe_ranks))
    text = {**text, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    if kind is CLIPModel:
        config: Any = CLIPConfig(vision_config=vision, text_config=text, projection_dim=text.get("hidden_size", 512))
        processor: Any = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    else:
        config = SiglipConfig(vision_config=vision, text_config=text)
        processor = SiglipProcessor(SiglipImageProcessor(size={"height": 224, "width": 224}), tokenizer)
    model = kind(config)
    spread(model, torch.empty(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def embed_by_transformers(folder: Path, images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return the pixels and the logits of a saved model of transformers."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    is_siglip = isinstance(model, SiglipModel)
    padding = {"padding": "max_length", "return_attention_mask": False} if is_siglip else {"padding": True}
    longest = model.config.text_config.max_position_embeddings
    inputs = processor(
        images=images, text=captions, truncation=True, max_length=longest, return_tensors="pt", **padding
    )
    return inputs["pixel_values"], model(**inputs).logits_per_image


def save_open_clip(name: str, folder: Path) -> None:
    """Save a random model of open_clip as its users have it."""
    model = open_clip.create_model(name, pretrained=None)
    config = open_clip.get_model_config(name)
    spread(model, torch.randn(4, 3, *2 * [config["vision_cfg"]["image_size"]]))
    folder.mkdir()
    about = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(about), encoding="utf-8")
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


def embed_by_open_clip(folder: Path, images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return the pixels and the logits of a saved model of open_clip."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.stack([transform(image) for image in images])
    return pixels, model.eval().get_logits(pixels, tokenizer(captions))[0]


@torch.no_grad()
def compare(name: str, library: str, images: list[Image.Image], captions: list[str]) -> str:
    """Return a row of the table."""
    torch.manual_seed(0)
    is_open_clip = library == "open_clip"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        (save_open_clip if is_open_clip else save_transformers)(name, folder)
        pixels, expected = (embed_by_open_clip if is_open_clip else embed_by_transformers)(folder, images, captions)
        model = convert(folder)
    inputs = model.processor(images=images, text=captions)
    own = model(**inputs).logits_per_image
    same = model(**{**inputs, "pixel_values": pixels}).logits_per_image
    towers = f"{model.config.vision_config.architecture}, {type(model.text_model).__name__}"
    differences = [f"{(found - expected).abs().max().item():.0e}" for found in (same, own)]
    millions = f"{model.num_parameters() / 1e6:.0f}"
    cells = (name, library, towers, millions, *differences, f"{expected.std(dim=0).mean().item():.2f}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    photos, texts = load_photos()
    names = [(name, "transformers") for name in TRANSFORMERS_MODELS]
    names += [(name, "open_clip") for name in OPEN_CLIP_MODELS]
    lines = [
        "| model | library | becomes | million parameters | same pixels | own preparation | spread of logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for model_name, library_name in names:
        lines.append(compare(model_name, library_name, photos, texts))
        print(lines[-1], flush=True)
    write_between("conversion", "\n".join([*lines, "", versions("torch", "transformers", "timm", "open_clip_torch")]))
