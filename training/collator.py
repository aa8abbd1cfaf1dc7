"""Items of a pair data set to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipmini.data.augment import raw_pixels
from modeling_clipmini import ClipMiniProcessor
from modeling_clipmini.images_clipmini import read_named

TENSORS = ("pixels", "vision_hidden", "pooled_image", "pooled_text", "teacher_image", "teacher_text")


@dataclass
class ClipMiniCollator:
    """Make a training batch: stack tensors, prepare pictures, tokenise captions padded to the batch's longest.

    Items are those of [`EpochPairs`], in which everything is drawn, or the plain rows of [`load_pairs`] (`image`,
    `captions`, `image_id`), such as transformers' own `Trainer` hands over: of these a caption is drawn with torch's
    random state.

    Attributes:
        processor: the model's processor.
    """

    processor: ClipMiniProcessor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B items.

        Args:
            items: B items of the same kind.

        Returns:
            `image_ids` (B,), and `rows` (B,) from `EpochPairs`; of the picture `pixel_values` (B, 3, height, width),
            or from `EpochPairs` `pixels`, the same in bytes, not normalised yet, a quarter of the memory;
            `pooled_image` (B, V) or `vision_hidden` (B, ...); of the caption `input_ids` and `attention_mask` (B, L)
            or `pooled_text` (B, W); and the teacher's (B, E) `teacher_image` and `teacher_text` where there is one.

        Raises:
            ImageError: a picture cannot be read; the message names it. `load_pairs` leaves such out.
        """
        batch = {"image_ids": torch.tensor([item["image_id"] for item in items])}
        if "row" in items[0]:
            batch["rows"] = torch.tensor([item["row"] for item in items])
        for name in TENSORS:
            if name in items[0]:
                batch[name] = torch.stack([item[name] for item in items])
        if "image" in items[0]:
            images = (read_named(item["image"], f"image_id {item['image_id']}") for item in items)
            if "row" in items[0]:
                batch["pixels"] = torch.stack([raw_pixels(self.processor.image_processor, image) for image in images])
            else:
                batch["pixel_values"] = self.processor(images=list(images))["pixel_values"]
        if "pooled_text" not in items[0]:
            captions = [item["caption"] if "caption" in item else _draw(item["captions"]) for item in items]
            batch.update(self.processor(text=captions))
        return batch


def _draw(captions: Sequence[str]) -> str:
    return captions[int(torch.randint(len(captions), ()))]
