"""Pooled features of frozen towers, computed once.

A frozen tower in eval mode gives the same output for the same picture or caption in every epoch. Computing it once
turns an hour of training into minutes; the heads then train on exactly the vectors they would have seen.
"""

import itertools
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from clipmini.inference.encode import run_images, run_texts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor


class CachedPairs(torch.utils.data.Dataset):
    """A pair data set with the pooled outputs of one or both towers in place of pictures or captions.

    Args:
        pairs: the data set, one row per image: `image`, `captions`, `image_id`.
        pooled_image: (I, V) pooled outputs of the vision tower, or None to keep the pictures.
        pooled_text: (T, W) pooled outputs of the text tower for all captions in order, or None to keep the captions.
    """

    def __init__(self, pairs: Dataset, pooled_image: Tensor | None = None, pooled_text: Tensor | None = None) -> None:
        self.pairs = pairs
        self.pooled_image = pooled_image
        self.pooled_text = pooled_text
        self.image_ids = list(pairs["image_id"])
        counts = [len(captions) for captions in pairs["captions"]]
        self.caption_starts = [0, *itertools.accumulate(counts)]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"image_id": self.image_ids[index]}
        if self.pooled_image is None or self.pooled_text is None:
            row.update(self.pairs[index])
        if self.pooled_image is not None:
            row.pop("image", None)
            row["pooled_image"] = self.pooled_image[index]
        if self.pooled_text is not None:
            row.pop("captions", None)
            row["pooled_captions"] = self.pooled_text[self.caption_starts[index] : self.caption_starts[index + 1]]
        return row


def cache_features(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset,
    *,
    vision: bool,
    text: bool,
    batch_size: int = 16,
) -> CachedPairs:
    """Run frozen towers over a data set once.

    Args:
        model: its towers in eval mode, as frozen towers are.
        processor: the model's processor.
        pairs: the data set, one row per image: `image`, `captions`, `image_id`.
        vision: compute the vision tower's outputs.
        text: compute the text tower's outputs, of every caption.
        batch_size: pictures per forward; captions go eight times as many at once.

    Returns:
        The data set to train on. Its vectors are float32, in memory: 4 V bytes per picture and 4 W per caption.
    """
    pooled_image = pooled_text = None
    if vision:
        images = pairs["image"]
        pooled_image = run_images(processor, images, lambda px: model.pool_images(px.to(model.device)), batch_size)
    if text:
        captions = list(itertools.chain.from_iterable(pairs["captions"]))
        pooled_text = run_texts(
            processor, captions, lambda inputs: model.pool_texts(**inputs.to(model.device)), 8 * batch_size
        )
    return CachedPairs(pairs, pooled_image, pooled_text)
