"""Build a model and its processor from a preset."""

import string
from dataclasses import dataclass, field
from typing import Any

import timm
from transformers import AutoTokenizer, DistilBertTokenizer, TimmWrapperConfig

from clipmini.names import locate
from clipmini.trust import refuse_code
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.processing_clipmini import image_processor_for, preparation_of

from .offline_towers import resolve_tower

# timm's names for how images are prepared
PREPARATION_KEYS = ("crop_mode", "crop_pct", "input_size", "interpolation", "mean", "std")


@dataclass
class ModelPreset:
    """The content of a file in `configuration/models`.

    Attributes:
        vision: a timm model: Hub id, local folder or `offline:` name; without pretrained weights, a timm architecture.
        side_vision: a second timm model, likewise, that sees the same pixels beside the first.
        text: a text encoder: Hub id, local folder or `offline:` name; without pretrained weights, a DistilBERT config.
        pretrained: start from pretrained towers; otherwise from random ones.
        pretrained_cfg: changes to timm's preparation of images for the vision tower: `crop_pct`, `input_size`,
            `interpolation`, ...
        config: fields of `ClipMiniConfig` other than the towers.
    """

    vision: str
    text: str | dict[str, Any]
    side_vision: str | None = None
    pretrained: bool = True
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def towers(self) -> dict[str, str]:
        """The names of the pretrained towers, by attribute."""
        names = {"vision": self.vision, "side_vision": self.side_vision, "text": str(self.text)}
        return {key: name for key, name in names.items() if name is not None}


def build_model(preset: ModelPreset) -> ClipMiniModel:
    """Build the untrained dual encoder of a preset.

    Returns:
        The model, in eval mode, with its processor.

    Raises:
        ValueError: a tower or a config field is invalid.
    """
    if not preset.pretrained:
        return _random_model(preset)
    if not isinstance(preset.text, str):
        raise ValueError(
            f"text={preset.text!r} is a config, which needs `pretrained: false`; use the name of a pretrained tower."
        )
    folders = {key: locate(resolve_tower(name), "a model folder") for key, name in preset.towers.items()}
    for folder in folders.values():
        refuse_code(folder)
    model = ClipMiniModel.from_vision_text_pretrained(
        folders["vision"],
        folders["text"],
        side_vision_model_name_or_path=folders.get("side_vision"),
        **preset.config,
    )
    _change_preparation(model.config.vision_config, preset.pretrained_cfg)
    model.processor = ClipMiniProcessor.from_towers(model.config, AutoTokenizer.from_pretrained(folders["text"]))
    return model


def _change_preparation(tower: TimmWrapperConfig, changes: dict[str, Any]) -> None:
    """Change how images are prepared for a vision tower, in its config, with which every model is saved."""
    for key in changes:
        if key not in PREPARATION_KEYS:
            raise ValueError(
                f"pretrained_cfg has no {key!r} that can be changed; it has {', '.join(PREPARATION_KEYS)}."
            )
    if not changes:
        return
    tower.pretrained_cfg = {**preparation_of(tower), **changes}
    try:
        image_processor_for(tower)
    except Exception as error:  # a value of the wrong type breaks timm's code in many ways
        raise ValueError(f"pretrained_cfg={changes!r} is not allowed: {error}") from error


def _random_model(preset: ModelPreset) -> ClipMiniModel:
    if not isinstance(preset.text, dict):
        raise ValueError(
            f"text={preset.text!r} cannot be used with `pretrained: false`; use fields of a DistilBERT config."
        )
    if not timm.is_model(preset.vision):
        raise ValueError(
            f"vision={preset.vision!r} is not an architecture of timm {timm.__version__}; see timm.list_models()."
        )
    tokenizer = character_tokenizer()
    config = ClipMiniConfig(
        vision_config={"architecture": preset.vision},
        side_vision_config={"architecture": preset.side_vision} if preset.side_vision else None,
        text_config={**preset.text, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        **preset.config,
    )
    _change_preparation(config.vision_config, preset.pretrained_cfg)
    model = ClipMiniModel(config).eval()
    model.processor = ClipMiniProcessor.from_towers(config, tokenizer)
    return model


def character_tokenizer() -> DistilBertTokenizer:
    """Return a tokenizer that needs no training or download: it splits into letters, digits and punctuation."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    special_tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = (*special_tokens, *characters, *(f"##{character}" for character in characters))
    return DistilBertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
