"""Measure retrieval over a whole split, from a model and its data to results: training and `evaluate` both do it here.

Every image and caption is embedded once. Where frozen parts of the towers have run already, their features are used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.data.pairs import PairDataset
from clipmini.inference.embed import DualEncoder, as_encoder
from clipmini.inference.encoders import check_widths
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import embed_in_batches, eval_mode
from modeling_clipmini.modeling_clipmini import normalize

from .diagnostics import Diagnostics, diagnose, quantize, truncate
from .intervals import Interval, bootstrap_intervals, interval_ends
from .retrieval import (
    DIRECTIONS,
    PRECISION_AT,
    QueryScores,
    Ranking,
    chance_metrics,
    rank_candidates,
    retrieval_scores,
    score_rankings,
    summarize_scores,
)

Metric = TypeVar("Metric")
PROJECTED_AT_ONCE = 8192  # pooled outputs of a tower that only its projection has to process
CURVE_END = 100  # the last k of a recall curve
MAX_COMPARED = 2000  # images, and captions, in the histogram of similarities that do not match


@dataclass(frozen=True)
class Embeddings:
    """Embedded images and captions of a split.

    Attributes:
        images: (I, D) float32, each of length 1.
        texts: (T, D) likewise, captions in the order of the rows.
        image_ids: (I,) integers.
        captions: the T captions.
        row_of_text: (T,) the row of each caption's image.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    captions: list[str]
    row_of_text: Tensor

    @property
    def text_image_ids(self) -> Tensor:
        """Ids of the captions' images, (T,)."""
        return self.image_ids[self.row_of_text]

    def scores(self, change: Callable[[Tensor], Tensor] = lambda vectors: vectors) -> dict[str, QueryScores]:
        """Score every query, by direction, with the vectors as they are, or changed, such as truncated."""
        return retrieval_scores(change(self.images), change(self.texts), self.text_image_ids, self.image_ids)

    def without(self, rows: Sequence[int], texts: Sequence[int]) -> "Embeddings":
        """Leave out some images with all their captions, and some captions more."""
        is_kept = torch.ones(len(self.images), dtype=torch.bool)
        is_kept[torch.tensor(rows, dtype=torch.long)] = False
        is_text_kept = is_kept[self.row_of_text]
        is_text_kept[torch.tensor(texts, dtype=torch.long)] = False
        new_row = is_kept.cumsum(dim=0) - 1
        return Embeddings(
            images=self.images[is_kept],
            texts=self.texts[is_text_kept],
            image_ids=self.image_ids[is_kept],
            captions=[self.captions[text] for text in is_text_kept.nonzero().flatten().tolist()],
            row_of_text=new_row[self.row_of_text[is_text_kept]],
        )


@dataclass(frozen=True)
class Miss:
    """A caption whose image ranked low.

    Attributes:
        caption: the query.
        row: the row of its image.
        rank: that image's rank, from 1.
        similarity: that image's cosine with the caption.
        beaten_by: rows of the images that ranked first, with their cosines.
    """

    caption: str
    row: int
    rank: int
    similarity: float
    beaten_by: list[tuple[int, float]]


@dataclass(frozen=True)
class RetrievalResult:
    """A model's retrieval on a split.

    Attributes:
        metrics: as in `summarize_scores`, with 95 % intervals.
        chance: recalls of a random order, under the same names.
        diagnostics: the shape of the shared space.
        by_width: metrics of embeddings truncated to some widths, the whole width last.
        by_precision: metrics of embeddings rounded to fewer bits, by name as in `PRECISIONS`, "float32" first.
        recall_curve: by direction, R@k for k from 1 to 100, or to all candidates where there are fewer.
        chance_curve: the same for a random order.
        scores: scores of every query, to compare with another model's.
        misses: the captions whose images ranked lowest.
    """

    metrics: dict[str, Interval]
    chance: dict[str, float]
    diagnostics: Diagnostics
    by_width: dict[int, dict[str, float]]
    by_precision: dict[str, dict[str, float]]
    recall_curve: dict[str, list[float]]
    chance_curve: dict[str, list[float]]
    scores: dict[str, QueryScores]
    misses: list[Miss]


def embed_pairs(encoder: DualEncoder, pairs: Dataset | PairDataset, batch_size: int = 16) -> Embeddings:
    """Embed every image and every caption of a split once.

    Args:
        encoder: the model; put in eval mode meanwhile.
        pairs: one row per image, as `load_pairs` returns them; or with features of the frozen parts of the encoder's
            towers, of which the first view is used.
        batch_size: images per forward pass; eight times as many captions.

    Raises:
        ImageError: an image cannot be read.
        ValueError: images and captions are embedded in different widths.
    """
    data = pairs if isinstance(pairs, PairDataset) else PairDataset(pairs)
    model: Any = encoder.module

    def embed_image_features(rows: list[int]) -> Tensor:
        assert data.image_features is not None
        batch = torch.tensor(data.image_features[rows, 0], dtype=torch.float32, device=model.device)
        pooled = batch if data.frozen_stages is None else data.frozen_stages.resume(model, batch)
        return model.get_image_features(pooled_image=pooled).pooler_output

    def embed_text_features(rows: list[int]) -> Tensor:
        assert data.text_features is not None
        batch = torch.tensor(data.text_features[rows], dtype=torch.float32, device=model.device)
        return model.get_text_features(pooled_text=batch).pooler_output

    captions = data.captions
    with eval_mode(encoder.module):
        if data.image_features is None:
            images = encoder.encode_images(data.rows["image"], batch_size)
        else:
            size = PROJECTED_AT_ONCE if data.frozen_stages is None else batch_size
            images = normalize(embed_in_batches(range(len(data)), embed_image_features, size))
        if data.text_features is None:
            texts = encoder.encode_texts(captions, 8 * batch_size)
        else:
            texts = normalize(embed_in_batches(range(len(captions)), embed_text_features, PROJECTED_AT_ONCE))
    check_widths(encoder, images, texts)
    return Embeddings(images, texts, torch.tensor(data.image_ids), captions, data.image_of_captions())


def measure_pairs(
    model: ClipMiniModel, pairs: Dataset | PairDataset, batch_size: int = 16, widths: Sequence[int] = ()
) -> dict[str, float]:
    """Measure retrieval on a split with all captions of every image.

    Args:
        model: with its processor.
        pairs: as in `embed_pairs`.
        batch_size: images per forward pass.
        widths: also measure embeddings truncated to these widths.

    Returns:
        As `summarize_scores`; for each width the same with the suffix `_at_{width}`.
    """
    return _at_widths(embed_pairs(as_encoder(model), pairs, batch_size), widths, summarize_scores)


def measure_split(
    model: ClipMiniModel, pairs: Dataset | PairDataset, batch_size: int = 16, widths: Sequence[int] = ()
) -> dict[str, Any]:
    """Measure retrieval on a split with intervals, in the form of `results.json`; arguments as in `measure_pairs`.

    Returns:
        `num_images`, `num_captions`, and by metric `chance`, `after` training, and `intervals` of the latter.
    """
    return measure_embeddings(embed_pairs(as_encoder(model), pairs, batch_size), widths)


def measure_embeddings(embeds: Embeddings, widths: Sequence[int] = ()) -> dict[str, Any]:
    """Measure retrieval on the embeddings of a split; as `measure_split`."""
    metrics = _at_widths(embeds, widths, bootstrap_intervals)
    return {
        "num_images": len(embeds.images),
        "num_captions": len(embeds.texts),
        "chance": chance_metrics(embeds.text_image_ids, embeds.image_ids),
        "after": {name: interval.value for name, interval in metrics.items()},
        "intervals": interval_ends(metrics),
    }


def choose_query(embeds: Embeddings, texts: Sequence[int]) -> tuple[int, bool]:
    """Choose the caption that a model tells best from others, as an example of a query.

    Args:
        embeds: of a split.
        texts: the captions to choose from, at least one.

    Returns:
        Its index, and whether its image ranks first of all.
    """
    rows = torch.tensor(texts)
    similarity = embeds.texts[rows] @ embeds.images.T  # (texts, I)
    is_own = embeds.text_image_ids[rows, None] == embeds.image_ids
    own, other = (similarity.masked_fill(mask, -torch.inf).amax(dim=1) for mask in (~is_own, is_own))
    best = int((own - other).argmax())
    return texts[best], bool(own[best] > other[best])


def _at_widths(
    embeds: Embeddings, widths: Sequence[int], summarize: Callable[[dict[str, QueryScores]], Mapping[str, Metric]]
) -> dict[str, Metric]:
    """Summarize the scores of whole embeddings, and of truncated ones under names that end in their width."""
    metrics = dict(summarize(embeds.scores()))
    for width in widths:
        truncated = summarize(embeds.scores(partial(truncate, width=width)))
        metrics |= {f"{name}_at_{width}": value for name, value in truncated.items()}
    return metrics


def measure_retrieval(
    embeds: Embeddings,
    *,
    logit_scale: float | None = None,
    widths: Sequence[int] = (),
    precisions: Sequence[str] = (),
    num_misses: int = 20,
    num_resamples: int = 1000,
) -> RetrievalResult:
    """Measure retrieval in both directions, all captions of every image against all images and vice versa.

    Args:
        embeds: as `embed_pairs` returns them.
        logit_scale: the model's; its inverse, the temperature, is reported with the diagnostics.
        widths: also measure embeddings truncated to these widths.
        precisions: also measure embeddings rounded to these, of `PRECISIONS`.
        num_misses: number of lowest ranking captions to list.
        num_resamples: resamples of the intervals.
    """
    full_width = embeds.images.shape[1]
    ids = embeds.text_image_ids, embeds.image_ids
    rankings = rank_candidates(embeds.images, embeds.texts, *ids, PRECISION_AT)
    scores = score_rankings(rankings, *ids)
    metrics = bootstrap_intervals(scores, num_resamples)
    values = {name: interval.value for name, interval in metrics.items()}
    by_width = {
        width: summarize_scores(embeds.scores(partial(truncate, width=width)))
        for width in sorted(set(widths) - {full_width})
    }
    by_precision = {
        name: summarize_scores(embeds.scores(partial(quantize, precision=name)))
        for name in precisions
        if name != "float32"
    }
    chance = chance_metrics(*ids, recall_at=range(1, CURVE_END + 1))
    candidates = zip(DIRECTIONS, (embeds.images, embeds.texts), strict=True)
    ks = {direction: range(1, min(CURVE_END, len(rows)) + 1) for direction, rows in candidates}
    return RetrievalResult(
        metrics=metrics,
        chance=chance_metrics(*ids),
        diagnostics=diagnose(embeds.images, embeds.texts, *ids, logit_scale and 1 / logit_scale),
        by_width={**by_width, full_width: values},
        by_precision={"float32": values, **by_precision},
        recall_curve={
            direction: [(score.ranks < k).double().mean().item() for k in ks[direction]]
            for direction, score in scores.items()
        },
        chance_curve={direction: [chance[f"{direction}_r{k}"] for k in ks[direction]] for direction in DIRECTIONS},
        scores=scores,
        misses=_misses(embeds, rankings[0], num_misses),
    )


def pair_similarities(embeds: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return the (T,) cosines of captions with their own images, and those of some captions with some other images."""
    matching = (embeds.texts * embeds.images[embeds.row_of_text]).sum(dim=1)
    generator = torch.Generator().manual_seed(0)
    texts, images = (
        torch.randperm(len(rows), generator=generator)[:MAX_COMPARED] for rows in (embeds.texts, embeds.images)
    )
    similarity = embeds.texts[texts] @ embeds.images[images].T
    is_other = embeds.text_image_ids[texts, None] != embeds.image_ids[None, images]
    return matching.numpy(), similarity[is_other].numpy()


def _misses(embeds: Embeddings, ranking: Ranking, num_misses: int) -> list[Miss]:
    lowest = ranking.ranks.argsort(descending=True, stable=True)[:num_misses]
    misses = []
    for text in lowest.tolist():
        rank = int(ranking.ranks[text])
        if rank < 1:
            break  # the rest were found
        pairs = zip(ranking.wrong_rows[text].tolist(), ranking.wrong[text].tolist(), strict=True)
        beaten_by = [(row, similarity) for row, similarity in pairs if row >= 0][:rank]
        row = int(embeds.row_of_text[text])
        misses.append(Miss(embeds.captions[text], row, rank + 1, ranking.correct[text, 0].item(), beaten_by))
    return misses
