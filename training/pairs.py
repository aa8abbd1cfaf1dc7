"""Pairs as training and evaluation meet them: where towers are frozen, with features in place of their inputs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipmini.data.augment import ImageAugmenter, drop_words
from clipmini.data.pairs import CachedPairs
from modeling_clipmini.images_clipmini import read_named

from .sampling import draw_index, draw_seed

if TYPE_CHECKING:
    from .teacher import TeacherEmbeddings

# Independent draws for one and the same pair take different last words of the seed.
CAPTION, VIEW, AUGMENTATION, WORDS = range(4)


class EpochPairs(torch.utils.data.Dataset):
    """The pairs that a `PairSampler` asks for: an image in its turn, with that turn's caption and view.

    Which caption, view, crop and words a turn meets depends on the seed, the image and the turn alone. Over the turns
    an image meets its captions evenly, and so its cached views.

    Args:
        pairs: what to train on.
        seed: another seed gives other draws.
        augment: draws pixels of a picture that is not cached; None to leave that to the collator.
        word_dropout: probability with which a word is left out of a caption that is not cached.
        teacher: gives the teacher's embeddings of a row's image and caption.
    """

    def __init__(
        self,
        pairs: CachedPairs,
        *,
        seed: int = 0,
        augment: ImageAugmenter | None = None,
        word_dropout: float = 0.0,
        teacher: "TeacherEmbeddings | None" = None,
    ) -> None:
        self.pairs, self.seed = pairs, seed
        self.augment, self.word_dropout, self.teacher = augment, word_dropout, teacher
        self.caption_starts = np.concatenate([[0], np.cumsum(pairs.num_captions)])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, turn = key
        pairs = self.pairs
        caption = draw_index(pairs.num_captions[row], turn, self.seed, row, CAPTION)
        item: dict[str, Any] = {"image_id": pairs.image_ids[row], "row": row}
        needs_row = pairs.image_features is None or pairs.text_features is None
        content = pairs.rows[row] if needs_row else {}
        if pairs.image_features is None:
            item.update(self._picture(content, row, turn))
        else:
            view = draw_index(pairs.image_features.shape[1], turn, self.seed, row, VIEW)
            name = "pooled_image" if pairs.front is None else "vision_hidden"
            item[name] = torch.tensor(pairs.image_features[row, view], dtype=torch.float32)
        if pairs.text_features is None:
            item["caption"] = content["captions"][caption]
            if self.word_dropout:
                item["caption"] = drop_words(
                    item["caption"], self.word_dropout, draw_seed(self.seed, row, turn, WORDS)
                )
        else:
            features = pairs.text_features[self.caption_starts[row] + caption]
            item["pooled_text"] = torch.tensor(features, dtype=torch.float32)
        if self.teacher is not None:
            image, text = self.teacher.rows(row, caption)
            item["teacher_image"], item["teacher_text"] = torch.as_tensor(image), torch.as_tensor(text)
        return item

    def _picture(self, content: dict[str, Any], row: int, turn: int) -> dict[str, Any]:
        if self.augment is None:
            return {"image": content["image"]}
        picture = read_named(content["image"], f"image_id {content['image_id']}")
        return {
            "pixels": self.augment.draw(picture, content["captions"], draw_seed(self.seed, row, turn, AUGMENTATION))
        }

    def names(self, rows: Sequence[int]) -> list[str]:
        """Name the pictures of some rows, for messages: their paths, or their image ids where they have none."""
        table = self.pairs.rows.select_columns(["image"])
        structs = [table[int(row)]["image"] for row in rows]
        ids = [self.pairs.image_ids[int(row)] for row in rows]
        return [
            (isinstance(image, dict) and image["path"]) or f"image_id {image_id}"
            for image, image_id in zip(structs, ids, strict=True)
        ]
