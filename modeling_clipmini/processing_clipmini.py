"""ClipMiniProcessor: images to `pixel_values`, captions to `input_ids` and `attention_mask`."""

import math
from os import PathLike
from typing import Any

import timm.data
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, TimmWrapperConfig
from transformers.processing_utils import ProcessingKwargs

from .configuration_clipmini import ClipMiniConfig
from .images_clipmini import convert_to_rgb

DEFAULT_MAX_TOKENS = 512  # for text towers without a table of positions
PILLOW_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # by timm's names


def preparation_of(vision_config: TimmWrapperConfig) -> dict[str, Any]:
    """Return the `pretrained_cfg` of a timm tower or, without one, timm's default for the architecture."""
    pretrained_cfg = getattr(vision_config, "pretrained_cfg", None)
    if not pretrained_cfg:
        known = timm.models.get_pretrained_cfg(vision_config.architecture)
        pretrained_cfg = known.to_dict() if known else {}
    return pretrained_cfg


def image_processor_for(vision_config: TimmWrapperConfig) -> CLIPImageProcessor:
    """Return a stock image processor, which needs no remote code, for a timm tower's evaluation transform.

    timm either resizes the shorter edge to floor(size / crop_pct) and cuts the center ("center"), or resizes both
    edges ("squash"). Pixels agree with `timm.data.create_transform` with one exception: where an odd number of pixels
    is cut off, stock processors leave the extra one always on the same side, torchvision on alternating sides.

    Args:
        vision_config: its `preparation_of` sets size, crop, interpolation, mean and std.

    Raises:
        ValueError: the tower's crop or interpolation has no stock equivalent.
    """
    data = timm.data.resolve_data_config(pretrained_cfg=preparation_of(vision_config))
    crop_mode = data["crop_mode"] or "center"
    if crop_mode not in ("center", "squash"):
        raise ValueError(
            f"timm crop_mode={crop_mode!r} is not supported; set pretrained_cfg['crop_mode'] to 'center'."
        )
    if data["interpolation"] not in PILLOW_FILTERS:
        raise ValueError(
            f"timm interpolation={data['interpolation']!r} is not supported; use {', '.join(PILLOW_FILTERS)}."
        )
    _, height, width = data["input_size"]
    scaled = {"height": math.floor(height / data["crop_pct"]), "width": math.floor(width / data["crop_pct"])}
    if crop_mode == "center" and height != width:
        raise ValueError(
            f"timm input_size={data['input_size']} with crop_mode='center' keeps the aspect ratio in a way that no "
            "stock image processor does; set pretrained_cfg['crop_mode']='squash'."
        )
    return CLIPImageProcessor(
        size={"shortest_edge": scaled["height"]} if crop_mode == "center" else scaled,
        crop_size={"height": height, "width": width},
        resample=PILLOW_FILTERS[data["interpolation"]],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


class ClipMiniProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call: captions are padded to the longest one and cut to `model_max_length`."""

    _defaults = {  # type: ignore[misc]  # noqa: RUF012 - transformers' API
        "text_kwargs": {"padding": True, "truncation": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class ClipMiniProcessor(ProcessorMixin):
    """A stock image processor and the text tower's tokenizer behind one call.

    Args:
        image_processor: a stock image processor, as from [`image_processor_for`].
        tokenizer: the text tower's tokenizer; its `model_max_length` must be set, since captions are cut to it.
    """

    valid_processor_kwargs = ClipMiniProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_towers(cls, config: ClipMiniConfig, tokenizer: PreTrainedTokenizerBase) -> "ClipMiniProcessor":
        """Create the processor of a model: the timm tower's own image transform, captions cut to fit the text tower.

        Args:
            config: the model's config.
            tokenizer: the text tower's tokenizer. It is modified: it returns only `input_ids` and `attention_mask`,
                and its `model_max_length` is lowered to the positions that the text tower has.
        """
        # If unset it is 1e30, and one long label would crash the tower.
        longest = config.max_text_tokens or DEFAULT_MAX_TOKENS
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return cls(image_processor=image_processor_for(config.vision_config), tokenizer=tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, captions or both.

        Args:
            images: an image or a list of them; Pillow images are turned upright and made opaque first.
            text: a caption or a list of them.
            **kwargs: as in `ProcessorMixin`; by default captions are padded to the longest and cut to
                `model_max_length`, and tensors are returned.

        Returns:
            `pixel_values` (I, 3, height, width), and `input_ids` and `attention_mask` (T, L), for what was passed.
        """
        if isinstance(images, Image.Image):
            images = convert_to_rgb(images)
        elif isinstance(images, (list, tuple)):
            images = [convert_to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
        return super().__call__(images=images, text=text, **kwargs)

    @property
    def min_edge(self) -> int | None:
        """Return the pixels that the shorter edge of an image should have, for `read_image`; None for all there are.

        They are twice as many as the image processor resizes to, so that its filter still decides on the result:
        benchmarks/encoding.py compares embeddings and recall with those of whole images.
        """
        size = getattr(self.image_processor, "size", None) or {}
        edges = [size.get(name) for name in ("shortest_edge", "height", "width")]
        return 2 * max((edge for edge in edges if edge), default=0) or None

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> list[str]:
        """Save `processor_config.json`, the tokenizer, and `preprocessor_config.json` for older clients."""
        files = self.image_processor.save_pretrained(save_directory)  # first, since the call below may push the folder
        return [*files, *super().save_pretrained(save_directory, *args, **kwargs)]
