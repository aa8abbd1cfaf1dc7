"""From a model preset to a model and its processor."""

import string
from dataclasses import dataclass, field
from typing import Any

import timm
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TimmWrapperConfig

from clipmini.inference.encode import load_model
from clipmini.inference.trust import refuse_code
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.processing_clipmini import image_processor_for

from .offline_towers import resolve_tower

PREPARATION = ("crop_mode", "crop_pct", "input_size", "interpolation", "mean", "std")  # of images, in timm's words


@dataclass
class ModelPreset:
    """What a file in `configuration/models` holds.

    Attributes:
        vision: a timm model: Hub id, local folder or `offline:` name; without pretrained weights, a timm architecture.
        text: a text encoder: Hub id, local folder or `offline:` name; without pretrained weights, a DistilBERT config.
        pretrained: start from pretrained towers; otherwise from random ones.
        pretrained_cfg: changes to how timm says that the vision tower's images are prepared: `crop_pct`,
            `input_size`, `interpolation`, ...
        config: fields of `ClipMiniConfig` other than the towers.
    """

    vision: str
    text: str | dict[str, Any]
    pretrained: bool = True
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def build_model(preset: ModelPreset) -> tuple[ClipMiniModel, ClipMiniProcessor]:
    """Make the untrained dual encoder of a preset.

    Args:
        preset: towers and heads.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        ValueError: a tower or a config field is wrong.
    """
    if not preset.pretrained:
        return _random_model(preset)
    if not isinstance(preset.text, str):
        raise ValueError("text must name a pretrained tower; a config needs `pretrained: false`.")
    vision, text = resolve_tower(preset.vision), resolve_tower(preset.text)
    for tower in (vision, text):
        refuse_code(tower)
    model = ClipMiniModel.from_vision_text_pretrained(vision, text, **preset.config)
    _prepare_otherwise(model.config.vision_config, preset.pretrained_cfg)
    return model, ClipMiniProcessor.from_towers(model.config, AutoTokenizer.from_pretrained(text))


def _prepare_otherwise(tower: TimmWrapperConfig, changes: dict[str, Any]) -> None:
    """Change how a vision tower's images are prepared; the config keeps it, and so every saved model."""
    for key in changes:
        if key not in PREPARATION:
            raise ValueError(f"pretrained_cfg has no {key!r} that can be changed; it has {', '.join(PREPARATION)}.")
    if not changes:
        return
    own = getattr(tower, "pretrained_cfg", None)
    known = timm.models.get_pretrained_cfg(tower.architecture)
    tower.pretrained_cfg = {**(own or (known.to_dict() if known else {})), **changes}
    try:
        image_processor_for(tower)
    except Exception as error:  # a value of the wrong type breaks timm's code in many ways
        raise ValueError(f"pretrained_cfg={changes!r} is not allowed: {error}") from error


def load_for_fine_tuning(name_or_path: str, config: dict[str, Any]) -> tuple[ClipMiniModel, ClipMiniProcessor]:
    """Load a saved clipmini model to train it further.

    Args:
        name_or_path: a model folder or a Hub id.
        config: fields of `ClipMiniConfig` to change; a trained model's are fixed, so there may be none.

    Returns:
        The model and its processor.

    Raises:
        ValueError: it is not a clipmini model, or `config` is not empty.
    """
    if config:
        raise ValueError(f"model_config={config!r} cannot change {name_or_path}: its heads are trained already.")
    return load_model(name_or_path)


def _random_model(preset: ModelPreset) -> tuple[ClipMiniModel, ClipMiniProcessor]:
    if not isinstance(preset.text, dict):
        raise ValueError(f"text={preset.text!r} with `pretrained: false`; give the fields of a DistilBERT config.")
    if not timm.is_model(preset.vision):
        raise ValueError(f"vision={preset.vision!r} is not an architecture that timm {timm.__version__} knows.")
    tokenizer = character_tokenizer()
    config = ClipMiniConfig(
        vision_config={"architecture": preset.vision},
        text_config={**preset.text, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        **preset.config,
    )
    _prepare_otherwise(config.vision_config, preset.pretrained_cfg)
    return ClipMiniModel(config).eval(), ClipMiniProcessor.from_towers(config, tokenizer)


def character_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer that needs no training and no download: lower-case letters, digits and punctuation.

    Returns:
        A WordPiece tokenizer whose pieces are single characters, with BERT's special tokens.
    """
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{character}" for character in characters),
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
