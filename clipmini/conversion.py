"""Turn a CLIP of another library, transformers or open_clip, into a `ClipMiniModel` that embeds the same.

The image tower becomes a timm model, since timm carries the towers of CLIP, SigLIP and MobileCLIP; the text tower
becomes transformers' `CLIPTextModel` if each of its tokens sees only those before it, and else `SiglipTextModel`.
Projections, temperature, bias, tokenizer and the preparation of images are kept.

There are more variants of these models than anyone could list. So each conversion is tried on an image and some
captions, and refused unless both models embed them alike.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from timm.models.vision_transformer import checkpoint_filter_fn
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
)

from clipmini.files import MODEL_FOLDER, WEIGHTS_FILE
from clipmini.names import (
    CONFIG_FILE,
    CONVERTIBLE,
    MODEL_TYPE,
    OPEN_CLIP_FILE,
    OPEN_CLIP_PREFIX,
    SENTENCE_TRANSFORMERS_FILE,
    first_sentence,
    locate_model,
)
from clipmini.store import converted_folder, digest, made_once
from clipmini.trust import fetch, read_json, refuse_code
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.modeling_clipmini import normalize
from modeling_clipmini.processing_clipmini import PILLOW_FILTERS

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1  # raise it when the output changes, so that older conversions in the cache are not used
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of transformers, without pickles
OPEN_CLIP_SCHEMES = ("hf-hub", "local-dir")  # open_clip's own prefixes; what follows them may contain slashes
MAX_DIFFERENCE = 1e-4  # of the elements of embeddings, which have length 1
# In standard deviations of the pixels, on average: open_clip rounds and crops in another way than stock processors.
MAX_PIXEL_DIFFERENCES = {"open_clip": 0.02, "transformers": 1e-4}
CAPTIONS = ("a photo of a cat", "Two dogs run; it\u2019s 3 o'clock", "many words " * 60)  # the last one is cut

# transformers' names of activation functions, and timm's
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
WIDTHS = {768: "base", 1024: "large", 1152: "so400m", 1280: "huge"}  # timm's names of vision transformers

# open_clip first applies ftfy and html.unescape, which mend much else that is rarer.
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'"}
MENDED: list[Any] = [
    *(normalizers.Replace(entity, character) for entity, character in ENTITIES.items()),
    normalizers.Replace(Regex("[\u2018-\u201b]"), "'"),
    normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
]
CANONICALIZE: list[Any] = [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]  # of SigLIP
SPACES: list[Any] = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]

# Names of parameters of transformers' vision towers, and timm's; each pattern is replaced in the order given.
VISION_NAMES = (
    (r"^embeddings\.class_embedding", "cls_token"),
    (r"^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^embeddings\.patch_embedding", "patch_embed.proj"),
    (r"^pre_layrnorm", "norm_pre"),
    (r"^post_layernorm", "norm"),
    (r"^encoder\.layers", "blocks"),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"self_attn\.", "attn."),
    (r"^head\.probe", "attn_pool.latent"),
    (r"^head\.attention\.out_proj", "attn_pool.proj"),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.layernorm", "attn_pool.norm"),
    (r"^head\.", "attn_pool."),
)
# Names of parameters of open_clip's text towers, and transformers'
TEXT_NAMES = (
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^positional_embedding", "embeddings.position_embedding.weight"),
    (r"^ln_final", "final_layer_norm"),
    (r"^transformer\.resblocks", "encoder.layers"),
    (r"ln_([12])", r"layer_norm\1"),
    (r"attn\.in_proj_", "self_attn.qkv_proj."),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"c_fc", "fc1"),
    (r"c_proj", "fc2"),
)


@dataclass
class _Parts:
    """What a `ClipMiniModel` is made of, taken from another library's model, and what that makes of some inputs.

    Attributes:
        vision: `architecture`, `model_args` and `pretrained_cfg` of a `TimmWrapperConfig`.
        vision_state: the timm model's parameters and buffers.
        text: the text tower's config.
        text_state: its parameters.
        heads: weight and bias of the image and the caption projection; None for one that does not exist.
        logit_scale: its logarithm.
        logit_bias: None for a softmax loss.
        tokenizer: of transformers.
        options: other fields of `ClipMiniConfig`.
        library: that the model is of, a key of `MAX_PIXEL_DIFFERENCES`.
        pixels: (1, 3, height, width), of `_sample_image`, as that model prepares it.
        image_embeds: (1, D), of `pixels`.
        text_embeds: (3, D), of `CAPTIONS`.
    """

    vision: dict[str, Any]
    vision_state: dict[str, Tensor]
    text: Any
    text_state: dict[str, Tensor]
    heads: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]
    logit_scale: Tensor
    logit_bias: Tensor | None
    tokenizer: Any
    options: dict[str, Any]
    library: str
    pixels: Tensor
    image_embeds: Tensor
    text_embeds: Tensor


def resolve_model(name: str | Path) -> str:
    """Return what to load a clipmini model by: its own folder or id, or what another model was converted into.

    A model is converted once: the result lies in the cache, and is made again if the model has changed.

    Args:
        name: a clipmini model, or one that `convert` takes.

    Raises:
        ValueError: as `convert` does; or the cache cannot be written.
    """
    located = str(locate_model(name))
    folder, converter = _choose_converter(located)
    if converter is None:
        return located
    slug = re.sub(r"[^\w.-]+", "-", str(name)).strip("-.")[-80:]
    files = [Path(located.partition("/")[2])]  # PRETRAINED of open_clip may be a file
    if folder is not None:  # in the Hub's cache, its name is the model's commit
        files = [] if folder.is_relative_to(HF_HUB_CACHE) else sorted(folder.rglob("*"))
    facts = [f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
    key = digest(converter.__name__, str(folder or located), *facts).hex()[:16]

    def make(target: Path) -> None:
        logger.warning("%s is converted into a clipmini model; the cache keeps it", name)
        model = convert(located)
        for part in (model, model.processor):
            part.save_pretrained(target / MODEL_FOLDER)
        (target / MODEL_FOLDER / WEIGHTS_FILE).chmod((target / MODEL_FOLDER / CONFIG_FILE).stat().st_mode)

    target = converted_folder() / f"{slug}-{key}-v{CONVERSION_VERSION}"
    return str(made_once(target, make, f"model {name}") / MODEL_FOLDER)


def convert(name: str | Path) -> ClipMiniModel:
    """Build a clipmini model that embeds as a model of another library does.

    Args:
        name: the folder or Hub id of a `CLIPModel` or `SiglipModel` of transformers, by itself or as the first module
            of a sentence-transformers model, or of a model of open_clip; or `open_clip:NAME/PRETRAINED`, such as
            `open_clip:ViT-B-32/laion2b_s34b_b79k`.

    Returns:
        The model with its processor, in eval mode, in float32, on the CPU.

    Raises:
        ValueError: there is no such model, its files would run code, or it cannot be converted; the message says why.
    """
    located = str(locate_model(name))
    folder, converter = _choose_converter(located)
    if converter is None:
        raise ValueError(f"{name} is a clipmini model already; load it as it is.")
    with _loading(located), torch.random.fork_rng(devices=[]), torch.no_grad():
        parts = converter(located, folder)
        model = _assemble(parts)
        _check_same(model, parts)
    return model


def _choose_converter(located: str) -> tuple[Path | None, Callable[[str, Path | None], _Parts] | None]:
    """Return the folder with a model's configuration, if it has one, and what converts it; None if nothing has to."""
    scheme, _, place = located.removeprefix(OPEN_CLIP_PREFIX).partition(":")
    if located.startswith(OPEN_CLIP_PREFIX):
        return refuse_code(place) if place and scheme in OPEN_CLIP_SCHEMES else None, _from_open_clip
    folder = refuse_code(located)
    config = read_json(folder / CONFIG_FILE)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type == MODEL_TYPE:
        return folder, None
    if (folder / SENTENCE_TRANSFORMERS_FILE).exists():
        return folder, _from_sentence_transformers
    if model_type is None and (folder / OPEN_CLIP_FILE).exists():
        return folder, _from_open_clip
    return folder, _from_transformers


def _assemble(parts: _Parts) -> ClipMiniModel:
    width = next(len(weight) for weight, _ in parts.heads if weight is not None)
    scale = parts.logit_scale.exp().item()
    loss: dict[str, Any] = {"loss": "infonce"}
    if parts.logit_bias is not None:
        loss = {"loss": "sigmoid", "logit_bias_init_value": parts.logit_bias.item()}
    config = ClipMiniConfig(
        vision_config=parts.vision,
        text_config=parts.text,
        projection_dim=width,
        projection_bias=any(bias is not None for _, bias in parts.heads),
        logit_scale_init_value=parts.logit_scale.item(),
        # SigLIP's scales are beyond CLIP's limit, and those of OpenAI's models a little.
        logit_scale_max=max(100.0, 10 * scale if parts.logit_bias is not None else scale),
        **loss,
        **parts.options,
    )
    model = ClipMiniModel(config).eval()
    _load(model.vision_model.timm_model, parts.vision_state, f"timm's {config.vision_config.architecture}")
    _load(model.text_model, parts.text_state, type(model.text_model).__name__)
    for head, (weight, bias) in zip((model.visual_projection, model.text_projection), parts.heads, strict=True):
        head.weight.copy_(torch.eye(width) if weight is None else weight)
        if head.bias is not None:
            head.bias.copy_(torch.zeros(width) if bias is None else bias)
    parts.tokenizer.padding_side = "right"
    model.processor = ClipMiniProcessor.from_towers(config, parts.tokenizer)
    return model


def _load(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or unexpected:
        problem = f"has no {unexpected[0]!r}" if unexpected else f"also needs {missing[0]!r}"
        raise ValueError(f"{name} {problem}")


def _check_same(model: ClipMiniModel, parts: _Parts) -> None:
    """Check that a converted model prepares and embeds an image and captions as the other one does."""
    images = normalize(model.get_image_features(parts.pixels).pooler_output)
    texts = normalize(model.get_text_features(**model.processor(text=list(CAPTIONS))).pooler_output)
    pixels = model.processor(images=[_sample_image()])["pixel_values"]
    allowed_pixels = MAX_PIXEL_DIFFERENCES[parts.library]
    differences = {
        "image embeddings": ((images - normalize(parts.image_embeds)).abs().max().item(), MAX_DIFFERENCE),
        "caption embeddings": ((texts - normalize(parts.text_embeds)).abs().max().item(), MAX_DIFFERENCE),
        "prepared images": (torch.inf, allowed_pixels),
    }
    if pixels.shape == parts.pixels.shape:
        differences["prepared images"] = (pixels - parts.pixels).abs().mean().item(), allowed_pixels
    for what, (difference, allowed) in differences.items():
        if not difference <= allowed:
            raise ValueError(f"its {what} would differ by {difference:.2g}, so it has parts of another kind")


def _sample_image() -> Image.Image:
    """Return an image of gradients with a little noise: 200 x 120 pixels."""
    x, y = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 120))
    noise = np.random.default_rng(0).normal(0, 5, (120, 200, 3))
    return Image.fromarray(np.clip(np.stack([x, y, (x + y) / 2], axis=2) + noise, 0, 255).astype(np.uint8))


def _rename(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _from_transformers(located: str, folder: Path | None) -> _Parts:
    model_type = AutoConfig.from_pretrained(located, trust_remote_code=False).model_type
    if model_type not in CONVERTIBLE:
        raise ValueError(f"it is a model of type {model_type!r}, and only {' and '.join(CONVERTIBLE)} are converted")
    loaded: Any = AutoModel.from_pretrained(
        located,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # to report them
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = loaded
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"its weight {name!r} has shape {tuple(found)}, and its configuration needs {tuple(wanted)}")
    if info["missing_keys"]:
        raise ValueError(f"it lacks weights, among them {sorted(info['missing_keys'])[0]!r}")
    processor = AutoProcessor.from_pretrained(located, trust_remote_code=False)
    model.eval()
    is_siglip = model_type == "siglip"
    text, tokenizer = model.config.text_config, processor.tokenizer
    if not is_siglip and text.eos_token_id == 2 and len(tokenizer) > tokenizer.eos_token_id + 1:
        raise ValueError("it pools captions at the highest id, which is not the end of a text but an added token")
    # SigLIP was trained on captions padded to the full length, without a mask.
    padding = {"padding": "max_length", "return_attention_mask": False} if is_siglip else {"padding": True}
    inputs = processor(
        text=list(CAPTIONS), truncation=True, max_length=text.max_position_embeddings, return_tensors="pt", **padding
    )
    pixels = processor(images=[_sample_image()], return_tensors="pt")["pixel_values"]
    image_embeds = model.get_image_features(pixels).pooler_output
    text_embeds = model.get_text_features(**inputs).pooler_output
    if not tokenizer.is_fast:
        tokenizer = _siglip_tokenizer(tokenizer)
    # In older configs the end of a text has a wrong id, and is found as the highest one.
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    options: dict[str, Any] = {"text_pooling": "eos"}
    if is_siglip:
        options = {"text_pooling": "last", "text_padding_id": tokenizer.pad_token_id}
    text_head = model.text_model.head if is_siglip else model.text_projection
    text_state = {name: value for name, value in model.text_model.state_dict().items() if not name.startswith("head.")}
    return _Parts(
        vision=_vision_config(model.config.vision_config, is_siglip, _preparation(processor.image_processor)),
        vision_state=_vision_state(model.vision_model.state_dict()),
        text=text,
        text_state=text_state,
        heads=(
            (None if is_siglip else model.visual_projection.weight, None),
            (text_head.weight, text_head.bias),
        ),
        logit_scale=model.logit_scale,
        logit_bias=model.logit_bias if is_siglip else None,
        tokenizer=tokenizer,
        options=options,
        library="transformers",
        pixels=pixels,
        image_embeds=image_embeds,
        text_embeds=text_embeds,
    )


def _vision_config(config: Any, is_siglip: bool, preparation: dict[str, Any]) -> dict[str, Any]:
    """Return the timm config of a vision transformer of transformers."""
    family, eps = ("siglip", 1e-6) if is_siglip else ("clip", 1e-5)
    if config.layer_norm_eps != eps or config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"its image tower has layer_norm_eps={config.layer_norm_eps} and hidden_act={config.hidden_act!r}; timm's "
            f"has {eps} and {' or '.join(ACTIVATIONS)}"
        )
    size, patch, width = config.image_size, config.patch_size, config.hidden_size
    name = f"vit_{WIDTHS.get(width)}_patch{patch}_{family}_{size}"
    return {
        "architecture": name if timm.is_model(name) else f"vit_base_patch16_{family}_224",
        "model_args": {
            "img_size": size,
            "patch_size": patch,
            "in_chans": config.num_channels,
            "embed_dim": width,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": (config.intermediate_size + 0.5) / width,  # timm rounds the product down
            "act_layer": ACTIVATIONS[config.hidden_act],
        },
        "pretrained_cfg": preparation,
    }


def _vision_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a vision transformer of transformers under timm's names, in timm's shapes."""
    renamed = _rename(state, VISION_NAMES)
    for name in [name for name in renamed if ".q_proj." in name]:  # timm has one matrix for all three
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    for kind in ("weight", "bias"):  # in SigLIP's attention pooling, two
        if (joint := renamed.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            query, *rest = joint.chunk(3)
            renamed[f"attn_pool.q.{kind}"], renamed[f"attn_pool.kv.{kind}"] = query, torch.cat(rest)
    renamed["pos_embed"] = renamed["pos_embed"][None]
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"][None, None]
    return renamed


def _preparation(image_processor: Any) -> dict[str, Any]:
    """Return how a stock image processor prepares images, in timm's words; `_check_same` finds what they omit."""
    if image_processor.model_input_names != ["pixel_values"]:
        raise ValueError(
            f"its image processor returns {', '.join(image_processor.model_input_names)}; name a model with a fixed "
            "image size, which takes pixel_values alone"
        )
    size, crop = dict(image_processor.size), dict(getattr(image_processor, "crop_size", None) or {})
    shortest = size.get("shortest_edge")
    height, width = (crop["height"], crop["width"]) if shortest else (size["height"], size["width"])
    return {
        "input_size": [3, height, width],
        "crop_pct": height / (shortest + 0.5) if shortest else 1.0,  # the edge is computed of it, rounded down
        "crop_mode": "center" if shortest else "squash",
        "interpolation": next(name for name, value in PILLOW_FILTERS.items() if value == image_processor.resample),
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
    }


def _from_sentence_transformers(located: str, folder: Path | None) -> _Parts:
    """Take the model of transformers that is the first module; the others only scale vectors to length 1."""
    assert folder is not None
    modules = read_json(folder / SENTENCE_TRANSFORMERS_FILE)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds[0] not in ("CLIPModel", "Transformer") or set(kinds[1:]) - {"Normalize"}:
        raise ValueError(f"its modules are {', '.join(kinds)}; only a CLIP, or one before Normalize, is converted")
    settings = read_json(folder / "config_sentence_transformers.json") or {}
    if prompt := (settings.get("prompts") or {}).get(settings.get("default_prompt_name")):
        raise ValueError(f"it puts the prompt {prompt!r} before each caption, which clipmini's models do not")
    inner = fetch(located, MODEL_FILES) / modules[0]["path"]
    return _from_transformers(str(inner), inner)


def _from_open_clip(located: str, folder: Path | None) -> _Parts:
    try:
        import open_clip
        from open_clip.model import get_model_preprocess_cfg
    except ImportError:
        raise ValueError("it needs open_clip: pip install open_clip_torch") from None
    architecture, pretrained = located.removeprefix(OPEN_CLIP_PREFIX), None
    if folder is not None:
        inner = fetch(architecture.removeprefix("hf-hub:").removeprefix("local-dir:"), MODEL_FILES)
        if not any(inner.glob("*.safetensors")):
            raise ValueError("it has no weights in safetensors, and pickled ones can run code")
        architecture = f"local-dir:{inner}"
    else:
        architecture, _, pretrained = architecture.partition("/")
        if not pretrained:
            raise ValueError(f"it names no weights; write {OPEN_CLIP_PREFIX}NAME/PRETRAINED")
    model, transform = open_clip.create_model_from_pretrained(architecture, pretrained, device="cpu")
    tokenizer = open_clip.get_tokenizer(architecture)
    model.eval()
    pixels = transform(_sample_image())[None]
    image_embeds, text_embeds = model.encode_image(pixels), model.encode_text(tokenizer(list(CAPTIONS)))
    own_tokenizer = _open_clip_tokenizer(tokenizer)
    own_tokenizer.model_max_length = tokenizer.context_length
    prepared = get_model_preprocess_cfg(model)
    height, width = prepared["size"] if isinstance(prepared["size"], (tuple, list)) else 2 * [prepared["size"]]
    if prepared["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(f"its resize_mode is {prepared['resize_mode']!r}; use shortest or squash")
    size = {"height": height, "width": width}
    stock = CLIPImageProcessor(
        size={"shortest_edge": height} if prepared["resize_mode"] == "shortest" else size,
        crop_size=size,
        resample=PILLOW_FILTERS[prepared["interpolation"]],
        image_mean=prepared["mean"],
        image_std=prepared["std"],
    )
    vision, vision_state, vision_head = _open_clip_vision(model.visual)
    padding = tokenizer(["a"])[0, -1].item()
    text, text_state, text_head, options = _open_clip_text(getattr(model, "text", model), own_tokenizer, padding)
    return _Parts(
        vision={**vision, "pretrained_cfg": _preparation(stock)},
        vision_state=vision_state,
        text=text,
        text_state=text_state,
        heads=(vision_head, text_head),
        logit_scale=model.logit_scale,
        logit_bias=getattr(model, "logit_bias", None),
        tokenizer=own_tokenizer,
        options=options,
        library="open_clip",
        pixels=pixels,
        image_embeds=image_embeds,
        text_embeds=text_embeds,
    )


def _open_clip_vision(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Return the timm config, parameters and projection of an image tower of open_clip."""
    if hasattr(visual, "trunk"):  # a timm model
        trunk, head = visual.trunk, visual.head
        layers = dict(head.named_children())
        projection = layers.get("proj") or trunk.get_classifier()
        if set(layers) - {"drop", "proj"}:
            raise ValueError(f"its image tower ends in {', '.join(layers)}; only a linear projection is converted")
        pool = getattr(trunk, "global_pool", None)
        trunk.reset_classifier(0)
        vision = {"architecture": trunk.pretrained_cfg["architecture"]}
        if isinstance(pool, str):
            vision["model_args"] = {"global_pool": pool}
        if not isinstance(projection, nn.Linear):
            return vision, trunk.state_dict(), (None, None)
        return vision, trunk.state_dict(), (projection.weight, projection.bias)
    if type(visual).__name__ != "VisionTransformer":
        raise ValueError(f"its image tower is a {type(visual).__name__}; a VisionTransformer or timm's are converted")
    blocks = visual.transformer.resblocks
    config = _layers(blocks, visual.ln_post)
    (size, _), (patch, _) = visual.image_size, visual.patch_size
    tower = AutoConfig.for_model(
        "clip_vision_model", image_size=size, patch_size=patch, hidden_size=visual.conv1.out_channels, **config
    )
    vision = _vision_config(tower, False, {})
    timm_model: Any = timm.create_model(vision["architecture"], num_classes=0, **vision["model_args"])
    named = {f"visual.{name}": value for name, value in visual.state_dict().items()}  # as timm expects them
    state = checkpoint_filter_fn(named, timm_model)
    projection = state.pop("head.weight", None)
    state.pop("head.bias", None)
    return vision, state, (projection, None)


def _open_clip_text(
    text: Any, tokenizer: Any, padding_id: int
) -> tuple[Any, dict[str, Tensor], tuple[Tensor | None, Tensor | None], dict[str, Any]]:
    """Return the config, parameters, projection and `ClipMiniConfig` fields of a text tower of open_clip."""
    if not hasattr(text, "positional_embedding"):
        raise ValueError(
            f"its text tower is a {type(text).__name__}; only open_clip's own TextTransformer is converted"
        )
    pool = getattr(text, "pool_type", None) or text.text_pool_type
    poolings = {"argmax": "eos", "eos": "eos", "last": "last", "first": "cls"}
    if pool not in poolings:
        raise ValueError(f"its text tower pools by {pool!r}; use {', '.join(poolings)}")
    num_positions, width = text.positional_embedding.shape
    fields = {
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": width,
        "max_position_embeddings": num_positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_layers(text.transformer.resblocks, text.ln_final),
    }
    is_causal = text.attn_mask is not None
    config = CLIPTextConfig(**fields) if is_causal else SiglipTextConfig(**fields, projection_size=width)
    projection = text.text_projection
    names = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    state = {name: value for name, value in text.state_dict().items() if name.split(".")[0] in names}
    renamed = _rename(state, TEXT_NAMES)
    for name in [name for name in renamed if ".qkv_proj." in name]:
        parts = zip("qkv", renamed.pop(name).chunk(3), strict=True)
        renamed |= {name.replace(".qkv_proj.", f".{part}_proj."): value for part, value in parts}
    head: tuple[Tensor | None, Tensor | None] = (None, None)
    if projection is not None:
        is_linear = isinstance(projection, nn.Linear)
        head = (projection.weight, projection.bias) if is_linear else (projection.T, None)
    # A tower that sees all tokens was trained to see the padding, too.
    options = {"text_pooling": poolings[pool], "text_padding_id": None if is_causal else padding_id}
    return config, renamed, head, options


def _layers(blocks: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    """Return what the layers of a transformer of open_clip have in common, in the words of transformers' configs."""
    block = blocks[0]
    activation = type(block.mlp.gelu).__name__, getattr(block.mlp.gelu, "approximate", None)
    kinds = {
        ("QuickGELU", None): "quick_gelu",
        ("GELU", "none"): "gelu",
        ("GELU", "tanh"): "gelu_pytorch_tanh",
    }
    return {
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.c_fc.out_features,
        "hidden_act": kinds[activation],
        "layer_norm_eps": norm.eps,
    }


def _open_clip_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer of transformers that turns captions into the same ids as one of open_clip."""
    own = getattr(tokenizer, "tokenizer", None)
    if own is None:  # CLIP's, in Python
        special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocab = {special.get(piece, piece): index for piece, index in tokenizer.encoder.items()}
        own = CLIPTokenizer(vocab=vocab, merges=list(tokenizer.bpe_ranks))
    cleaning: dict[str, list[Any]] = {
        "_clean_whitespace": [],
        "_clean_lower": [normalizers.Lowercase()],
        "_clean_canonicalize": [normalizers.Replace("_", " "), *CANONICALIZE],
    }
    steps = [*MENDED, *cleaning[tokenizer.clean_fn.__name__], *SPACES]
    return _with_normalizers(own, own.backend_tokenizer, steps)


def _siglip_tokenizer(slow: Any) -> Any:
    """Return a tokenizer in Rust, which needs no sentencepiece, that does as `SiglipTokenizer`, which is in Python."""
    model = slow.sp_model
    pieces = [(model.id_to_piece(index), model.get_score(index)) for index in range(model.get_piece_size())]
    backend = Tokenizer(Unigram(pieces, unk_id=slow.unk_token_id))
    backend.pre_tokenizer = Metaspace()
    backend.post_processor = TemplateProcessing(
        single=f"$A {slow.eos_token}", special_tokens=[(slow.eos_token, slow.eos_token_id)]
    )
    return _with_normalizers(slow, backend, [*CANONICALIZE, *SPACES])


def _with_normalizers(tokenizer: Any, backend: Any, steps: list[Any]) -> Any:
    """Return a tokenizer with a backend that first takes some steps; its own class would forget them when loaded."""
    rest = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence(steps + rest)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Raise any error of a library that loads a model as a one-sentence ValueError."""
    try:
        yield
    except Exception as error:  # libraries raise nearly anything for a configuration with a wrong value in it
        raise ValueError(f"The model {name} cannot be converted: {first_sentence(error)}.") from error
