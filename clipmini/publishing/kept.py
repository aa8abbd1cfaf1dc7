"""What a model is good at, as one figure: to see what training for something new costs elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from datasets import Dataset

from clipmini.data.images import Skipped
from clipmini.data.labeled import keep_readable, load_labeled
from clipmini.data.pairs import PairDataset, choose_split
from clipmini.evaluation.classification import measure_zero_shot
from clipmini.evaluation.intervals import Difference, Interval, bootstrap_intervals, paired_bootstrap, paired_shares
from clipmini.evaluation.measure import embed_pairs
from clipmini.evaluation.report import load_pairs
from clipmini.inference.embed import DualEncoder
from clipmini.names import public_name
from clipmini.recipe_files import read_data_section
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import by_length, channels_last, embed_in_batches
from modeling_clipmini.handler import DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Score:
    """A model's figure on a split.

    Attributes:
        split: its name.
        metric: "mean_recall" of pairs, or "top1", the zero-shot accuracy on labeled images.
        interval: the figure, in [0, 1], and its 95 % interval.
        answers: what it is the mean of, to compare with another model's: scores of queries, or (N,) booleans.
    """

    split: str
    metric: str
    interval: Interval
    answers: Any

    def minus(self, other: "Score") -> Difference:
        """Return how much better this model is than another on the same split, by a paired bootstrap."""
        if self.metric == "top1":
            return paired_shares(self.answers, other.answers)
        return paired_bootstrap(self.answers, other.answers)[self.metric]


@dataclass(frozen=True)
class Task:
    """Data to measure models on: image-caption pairs, or labeled images.

    Attributes:
        source: the data.
        splits: data sets, as `load_pairs` or `load_labeled` returns them; or with features of the towers.
        names: the class names; empty for pairs.
    """

    source: str
    splits: Mapping[str, Dataset | PairDataset]
    names: list[str]

    @classmethod
    def load(cls, name: str, skipped: Skipped) -> Self:
        """Load pairs, from a recipe or from a source that is not split; or else labeled images.

        Raises:
            ValueError: it is neither.
        """
        try:
            source, pairs = load_pairs(read_data_section(name, {}), skipped)
            return cls(source, pairs, [])
        except ValueError as error:
            no_pairs = error
        try:
            images = load_labeled(name)
        except ValueError as error:
            raise ValueError(f"{name} holds neither pairs ({no_pairs}) nor labeled images ({error})") from error
        splits = {split: keep_readable(rows, split, skipped) for split, rows in images.splits.items()}
        return cls(name, splits, images.names)

    def choose(self, wanted: str) -> str:
        """Return the name of a wanted split or, without it, that of test, validation or train."""
        return choose_split(self.splits, wanted if wanted in self.splits else None, self.source)

    def with_features(self, model: ClipMiniModel) -> Self:
        """Run a model's towers once over the held-out pairs, for models that differ from it in their heads alone."""
        if self.names:
            return self
        encoder, splits = DualEncoder(model), {}
        for split in {self.choose("validation"), self.choose("test")}:
            data = PairDataset(self.splits[split])
            images = embed_in_batches(
                map(encoder.prepare, data.rows["image"]),
                lambda batch: model.pool_images(channels_last(torch.cat(batch).to(model.device))),
                16,
            )
            texts = embed_in_batches(
                data.captions,
                lambda batch: model.pool_texts(**model.processor(text=batch).to(model.device)),
                128,
                by_length,
            )
            splits[split] = PairDataset(data.rows, images[:, None].numpy(), texts.numpy())
        return replace(self, splits=splits)

    def measure(self, model: ClipMiniModel, wanted: str = "test") -> Score:
        """Measure a model, with its processor, on a split that `choose` returns."""
        split = self.choose(wanted)
        rows, encoder = self.splits[split], DualEncoder(model)
        if self.names:
            assert isinstance(rows, Dataset)
            metrics = measure_zero_shot(encoder, rows, self.names, [DEFAULT_TEMPLATE])
            return Score(split, "top1", metrics.shares["top1"], metrics.is_correct)
        scores = embed_pairs(encoder, rows).scores()
        return Score(split, "mean_recall", bootstrap_intervals(scores)["mean_recall"], scores)

    def compare(self, before: Score, after: Score) -> dict[str, Any]:
        """Return what has changed on a split, ready for JSON."""
        return {
            "source": public_name(self.source),
            "split": after.split,
            "num_images": len(self.splits[after.split]),
            "metric": after.metric,
            "before": asdict(before.interval),
            "after": asdict(after.interval),
            "change": asdict(after.minus(before)),
        }
