"""Rows of a pair data set to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipmini.inference.encode import read_named
from modeling_clipmini import ClipMiniProcessor


@dataclass
class ClipMiniCollator:
    """Make a training batch: one row per image, one caption drawn per image, padded to the batch's longest.

    Each epoch draws anew, so over the epochs a picture meets all its captions, and never two in one batch. The draw
    uses torch's random state, which Trainer seeds, saves in checkpoints and gives each data worker its own of.

    Rows are those of [`load_pairs`] (`image`, `captions`, `image_id`) or of [`CachedPairs`], where `pooled_image`
    stands for the picture and `pooled_captions` for the captions.

    Attributes:
        processor: the model's processor.
    """

    processor: ClipMiniProcessor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B rows.

        Args:
            rows: B rows of the data set.

        Returns:
            `image_ids` (B,); `pixel_values` (B, 3, height, width) or `pooled_image` (B, V); `input_ids` and
            `attention_mask` (B, L) or `pooled_text` (B, W).

        Raises:
            ImageError: a picture cannot be read; the message names it. `load_pairs` leaves such out.
        """
        batch: dict[str, Tensor] = {"image_ids": torch.tensor([row["image_id"] for row in rows])}
        if "pooled_image" in rows[0]:
            batch["pooled_image"] = torch.stack([row["pooled_image"] for row in rows])
        else:
            images = [read_named(row["image"], f"image_id {row['image_id']}") for row in rows]
            batch["pixel_values"] = self.processor(images=images)["pixel_values"]
        if "pooled_captions" in rows[0]:
            batch["pooled_text"] = torch.stack([_draw(row["pooled_captions"]) for row in rows])
        else:
            batch.update(self.processor(text=[_draw(row["captions"]) for row in rows]))
        return batch


def _draw(captions: Any) -> Any:
    return captions[torch.randint(len(captions), ()).item()]
