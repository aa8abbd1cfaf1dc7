"""The pairs of an epoch, their order and their batches: a pure function of seed, epoch and image.

Nothing that is drawn for an epoch depends on the global random state. An epoch has the same batches with any number of
data workers, and in a run that was killed and resumed. Features of frozen towers replace the inputs of the towers.
Captions of similar length can be embedded together, with less padding to compute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmini.data.augment import ImageAugmenter, raw_pixels
from clipmini.data.pairs import PairDataset
from clipmini.inference.teacher import TeacherEmbeddings
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.images_clipmini import read_named


class PairSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Yield (row, epoch) once for each image, in another order for each seed and epoch."""

    def __init__(self, num_images: int, *, seed: int = 0) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def __len__(self) -> int:
        return self.num_images

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        return ((row, self.epoch) for row in order.tolist())


def draw_index(count: int, epoch: int, *seed: int) -> int:
    """Draw an index in [0, count) without replacement: in `count` epochs, from 0, each is drawn once."""
    cycle, position = divmod(epoch, count)
    return int(np.random.default_rng((*seed, cycle)).permutation(count)[position])


def draw_seed(*seed: int) -> int:
    """Mix non-negative integers into one seed in [0, 2**32)."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


# Last word of the seed, so that the draws for one pair are independent of each other.
CAPTION, VIEW, AUGMENTATION = range(3)


class EpochPairs(torch.utils.data.Dataset):
    """The pairs that a `PairSampler` asks for: an image with the caption and the view that are drawn for an epoch.

    Caption, view and crop depend only on the seed, the image and the epoch. Over the epochs, each caption of an
    image, and each of its cached views, is drawn equally often.

    Args:
        pairs: the training data.
        seed: seed of the draws.
        augment: augments images that are not cached; None to leave their preparation to the collator.
        teacher: a teacher's embeddings of the training data, or None.
    """

    def __init__(
        self,
        pairs: PairDataset,
        *,
        seed: int = 0,
        augment: ImageAugmenter | None = None,
        teacher: TeacherEmbeddings | None = None,
    ) -> None:
        self.pairs, self.seed = pairs, seed
        self.augment, self.teacher = augment, teacher

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, epoch = key
        pairs = self.pairs
        caption = draw_index(int(pairs.num_captions[row]), epoch, self.seed, row, CAPTION)
        item: dict[str, Any] = {"image_id": int(pairs.image_ids[row]), "row": row}
        needs_row = pairs.image_features is None or pairs.text_features is None
        content = pairs.rows[row] if needs_row else {}
        if pairs.image_features is not None:
            view = draw_index(pairs.image_features.shape[1], epoch, self.seed, row, VIEW)
            name = "pooled_image" if pairs.frozen_stages is None else "vision_hidden"
            item[name] = torch.tensor(pairs.image_features[row, view], dtype=torch.float32)
        elif self.augment is not None:
            image = read_named(content["image"], f"image_id {content['image_id']}")
            seed = draw_seed(self.seed, row, epoch, AUGMENTATION)
            item["pixels"] = self.augment.draw(image, content["captions"], seed)
        else:
            item["image"] = content["image"]
        if pairs.text_features is None:
            item["caption"] = content["captions"][caption]
        else:
            features = pairs.text_features[pairs.caption_starts[row] + caption]
            item["pooled_text"] = torch.tensor(features, dtype=torch.float32)
        if self.teacher is not None:
            item["teacher_image"], item["teacher_text"] = self.teacher.rows(row, caption)
        return item

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return names of images for messages: their paths, or their image ids where they have none."""
        contents = self.pairs.rows.select_columns(["image", "image_id"])
        return [
            (isinstance(content["image"], dict) and content["image"]["path"]) or f"image_id {content['image_id']}"
            for content in (contents[row] for row in rows)
        ]


TENSORS = ("pixels", "vision_hidden", "pooled_image", "pooled_text", "teacher_image", "teacher_text")


@dataclass
class ClipMiniCollator:
    """Make a training batch: stack tensors, prepare images, tokenize captions and pad them to the longest.

    Items are those of [`EpochPairs`], in which everything is drawn, or plain rows of [`load_pairs`] (`image`,
    `captions`, `image_id`), as transformers' own `Trainer` passes them: one of their captions is drawn with torch's
    random state.
    """

    processor: ClipMiniProcessor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate B items of the same kind.

        Returns:
            `image_ids` (B,), and `rows` (B,) of items of `EpochPairs`; for images `pixel_values` (B, 3, height, width)
            normalized, or for items of `EpochPairs` `pixels`, the same as bytes in [0, 255], a quarter of the memory;
            or `pooled_image` (B, V), or `vision_hidden` (B, ...); for captions `input_ids` and `attention_mask`
            (B, L), or `pooled_text` (B, W); and `teacher_image` and `teacher_text` (B, E) if there is a teacher.

        Raises:
            ImageError: an image cannot be read; the message names it. `load_pairs` leaves out such images.
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
            captions = [item["caption"] if "caption" in item else _draw_caption(item["captions"]) for item in items]
            batch.update(self.processor(text=captions))
        return batch


def _draw_caption(captions: Sequence[str]) -> str:
    return captions[int(torch.randint(len(captions), ()))]


def pool_by_length(model: ClipMiniModel, input_ids: Tensor, attention_mask: Tensor, num_groups: int) -> Tensor:
    """Run the text tower over groups of captions of similar length, each without the padding that it does not need.

    A batch is padded to its longest caption, which is often twice as long as most. Padding is masked, so the result is
    the same, except that dropout draws other units.

    Args:
        model: the dual encoder.
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L).
        num_groups: of which at most B are made.

    Returns:
        (B, W) pooled outputs, in the order of the batch.
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    pooled = []
    for rows in order.tensor_split(min(num_groups, len(order))):
        longest = int(lengths[rows].max())
        pooled.append(model.pool_texts(input_ids[rows, :longest], attention_mask[rows, :longest]))
    return torch.cat(pooled)[order.argsort()]
