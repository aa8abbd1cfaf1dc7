"""Which pairs make up an epoch, in what order, and how they become batches: a pure function of seed, epoch and image.

Nothing here draws from the global random state. The same epoch gives the same batches on any number of data workers,
and in a run that was killed and resumed. Where towers are frozen, features stand in place of their inputs. Captions of
like length can be embedded together: less padding to compute.
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
    """Yield (row, epoch) for each image once an epoch, in another order each time.

    Args:
        num_images: number of rows.
        seed: another seed gives another order.
    """

    def __init__(self, num_images: int, *, seed: int = 0) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def __len__(self) -> int:
        return self.num_images

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        return ((row, self.epoch) for row in order.tolist())


def draw_index(count: int, epoch: int, *seed: int) -> int:
    """Draw one of `count` things, without replacement: each is drawn once in `count` epochs.

    Args:
        count: at least 1.
        epoch: from 0.
        *seed: another seed, such as the run's and the image's, gives another order.

    Returns:
        An index in [0, count).
    """
    cycle, position = divmod(epoch, count)
    return int(np.random.default_rng((*seed, cycle)).permutation(count)[position])


def draw_seed(*seed: int) -> int:
    """Mix some non-negative integers into one seed in [0, 2**32)."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


# Independent draws for one and the same pair take different last words of the seed.
CAPTION, VIEW, AUGMENTATION = range(3)


class EpochPairs(torch.utils.data.Dataset):
    """The pairs that a `PairSampler` asks for: an image with the caption and the view that it meets in an epoch.

    Caption, view and crop depend on the seed, the image and the epoch alone. Over the epochs, an image meets
    each of its captions, and each of its cached views, equally often.

    Args:
        pairs: what to train on.
        seed: another seed gives other draws.
        augment: draws pixels of an image that is not cached; None to leave that to the collator.
        teacher: gives the teacher's embeddings of a row's image and caption.
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
        self.caption_starts = np.concatenate([[0], np.cumsum(pairs.num_captions)])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, epoch = key
        pairs = self.pairs
        caption = draw_index(pairs.num_captions[row], epoch, self.seed, row, CAPTION)
        item: dict[str, Any] = {"image_id": pairs.image_ids[row], "row": row}
        needs_row = pairs.image_features is None or pairs.text_features is None
        content = pairs.rows[row] if needs_row else {}
        if pairs.image_features is None:
            item.update(self._image(content, row, epoch))
        else:
            view = draw_index(pairs.image_features.shape[1], epoch, self.seed, row, VIEW)
            name = "pooled_image" if pairs.frozen_stages is None else "vision_hidden"
            item[name] = torch.tensor(pairs.image_features[row, view], dtype=torch.float32)
        if pairs.text_features is None:
            item["caption"] = content["captions"][caption]
        else:
            features = pairs.text_features[self.caption_starts[row] + caption]
            item["pooled_text"] = torch.tensor(features, dtype=torch.float32)
        if self.teacher is not None:
            embeds = self.teacher.rows(row, caption)
            item["teacher_image"], item["teacher_text"] = map(torch.as_tensor, embeds)
        return item

    def _image(self, content: dict[str, Any], row: int, epoch: int) -> dict[str, Any]:
        if self.augment is None:
            return {"image": content["image"]}
        image = read_named(content["image"], f"image_id {content['image_id']}")
        return {
            "pixels": self.augment.draw(image, content["captions"], draw_seed(self.seed, row, epoch, AUGMENTATION))
        }

    def names(self, rows: Sequence[int]) -> list[str]:
        """Name the images of some rows, for messages: their paths, or their image ids where they have none."""
        table = self.pairs.rows.select_columns(["image"])
        structs = [table[int(row)]["image"] for row in rows]
        ids = [self.pairs.image_ids[int(row)] for row in rows]
        return [
            (isinstance(image, dict) and image["path"]) or f"image_id {image_id}"
            for image, image_id in zip(structs, ids, strict=True)
        ]


TENSORS = ("pixels", "vision_hidden", "pooled_image", "pooled_text", "teacher_image", "teacher_text")


@dataclass
class ClipMiniCollator:
    """Make a training batch: stack tensors, prepare images, tokenize captions padded to the batch's longest.

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
            `image_ids` (B,), and `rows` (B,) from `EpochPairs`; of the image `pixel_values` (B, 3, height, width),
            or from `EpochPairs` `pixels`, the same in bytes, not normalized yet, a quarter of the memory;
            `pooled_image` (B, V) or `vision_hidden` (B, ...); of the caption `input_ids` and `attention_mask` (B, L)
            or `pooled_text` (B, W); and the teacher's (B, E) `teacher_image` and `teacher_text` where there is one.

        Raises:
            ImageError: an image cannot be read; the message names it. `load_pairs` leaves such out.
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


def pool_by_length(model: ClipMiniModel, input_ids: Tensor, attention_mask: Tensor, num_groups: int) -> Tensor:
    """Run the text tower over a batch in groups of captions of like length, each cut to its own longest.

    A batch is padded to its longest caption, often twice as long as most. Padding is masked out, so the result is the
    same; only what dropout drops is another draw.

    Args:
        model: its `pool_texts` is run.
        input_ids: (B, L), padded on the right.
        attention_mask: (B, L).
        num_groups: at least 1; no more than B are made.

    Returns:
        (B, W) what `pooled_text` takes, in the order of the batch.
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    pooled = []
    for rows in order.tensor_split(min(num_groups, len(order))):
        longest = int(lengths[rows].max())
        pooled.append(model.pool_texts(input_ids[rows, :longest], attention_mask[rows, :longest]))
    return torch.cat(pooled)[order.argsort()]
