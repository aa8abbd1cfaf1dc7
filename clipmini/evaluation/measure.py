"""Measure retrieval over a whole split: every image and caption embedded once, metrics with intervals, failures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.data.pairs import PairDataset
from clipmini.inference.encode import encode_images, encode_texts
from clipmini.inference.encoders import DualEncoder, check_widths
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import eval_mode

from .diagnostics import Diagnostics, diagnose, quantize, truncate
from .intervals import Interval, bootstrap_intervals
from .retrieval import (
    DIRECTIONS,
    PRECISION_AT,
    QueryScores,
    Ranking,
    chance_metrics,
    rank_candidates,
    retrieval_metrics,
    retrieval_scores,
    score_rankings,
    summarize_scores,
)

CACHED_CHUNK_SIZE = 8192  # rows of cached features projected at once
CURVE_END = 100  # the last k of a recall curve
MAX_COMPARED = 2000  # images, and captions, in the histogram of similarities that do not match


def embed_pairs(
    model: ClipMiniModel, processor: ClipMiniProcessor, pairs: Dataset | PairDataset, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Embed all images and all captions of a pair data set.

    Args:
        model: in eval mode.
        processor: the model's processor.
        pairs: one row per image; of cached features the first view is used.
        batch_size: images per forward pass; eight times as many captions.

    Returns:
        (I, D) image and (T, D) caption embeddings, float32 on the CPU, each of length 1; captions in the order of the
        rows.
    """
    cached = _cached(pairs)
    if cached.image_features is None:
        image_embeds = encode_images(model, processor, cached.rows["image"], batch_size)
    elif cached.frozen_stages is None:
        image_embeds = _embed_features(model, cached.image_features[:, 0], "pooled_image", CACHED_CHUNK_SIZE)
    else:
        with cached.frozen_stages.resuming():
            image_embeds = _embed_features(model, cached.image_features[:, 0], "pixel_values", batch_size)
    if cached.text_features is None:
        text_embeds = encode_texts(model, processor, cached.captions, 8 * batch_size)
    else:
        text_embeds = _embed_features(model, cached.text_features, "pooled_text", CACHED_CHUNK_SIZE)
    return image_embeds, text_embeds


def evaluate_retrieval(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | PairDataset,
    batch_size: int = 16,
    widths: Sequence[int] = (),
) -> dict[str, float]:
    """Measure retrieval on a whole split with all captions of every image; see `summarize_scores`.

    Args:
        model: put in eval mode during the measurement.
        processor: the model's processor.
        pairs: one row per image.
        batch_size: images per forward pass.
        widths: also measure embeddings truncated to these widths.

    Returns:
        `text_to_image_r1`, ..., `mean_recall`, in [0, 1]; for each width the same with the suffix `_at_{width}`.
    """
    return _evaluate(summarize_scores, model, processor, pairs, batch_size, widths)


def evaluate_with_intervals(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | PairDataset,
    batch_size: int = 16,
    widths: Sequence[int] = (),
) -> dict[str, Interval]:
    """Measure as `evaluate_retrieval` does, and return each metric with its 95 % bootstrap interval over images."""
    return _evaluate(bootstrap_intervals, model, processor, pairs, batch_size, widths)


def _evaluate(
    summarize: Callable[[dict[str, QueryScores]], dict[str, Any]],
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | PairDataset,
    batch_size: int,
    widths: Sequence[int],
) -> dict[str, Any]:
    with eval_mode(model):
        embeds = embed_pairs(model, processor, pairs, batch_size)
    ids = _ids(pairs)
    metrics = summarize(retrieval_scores(*embeds, *ids))
    for width in widths:
        image_embeds, text_embeds = (truncate(rows, width) for rows in embeds)
        at_width = summarize(retrieval_scores(image_embeds, text_embeds, *ids))
        metrics |= {f"{name}_at_{width}": value for name, value in at_width.items()}
    return metrics


def chance_level(pairs: Dataset | PairDataset) -> dict[str, float]:
    """Return the recalls of a random order on the same split, under the same keys."""
    return chance_metrics(*_ids(pairs))


def _ids(pairs: Dataset | PairDataset) -> tuple[Tensor, Tensor]:
    """Return the image ids of all captions and of all rows."""
    cached = _cached(pairs)
    image_ids = torch.tensor(cached.image_ids)
    return image_ids[cached.image_of_captions()], image_ids


def _cached(pairs: Dataset | PairDataset) -> PairDataset:
    return pairs if isinstance(pairs, PairDataset) else PairDataset(pairs)


@torch.no_grad()
def _embed_features(model: ClipMiniModel, features: np.ndarray, name: str, batch_size: int) -> Tensor:
    """Pass cached features through the rest of their tower."""
    results = []
    for start in range(0, len(features), batch_size):
        batch = torch.tensor(features[start : start + batch_size], dtype=torch.float32, device=model.device)
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        output = model(**{name: batch})
        embeds = output.text_embeds if name == "pooled_text" else output.image_embeds
        results.append(embeds.float().cpu())
    return torch.cat(results)


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
        num_images: I.
        num_texts: T.
        width: D.
        metrics: as in `summarize_scores`, with 95 % intervals.
        chance: recalls of a random order, under the same names.
        diagnostics: the shape of the shared space.
        by_width: metrics of embeddings truncated to some widths, the whole width last.
        by_precision: metrics of embeddings rounded to fewer bits, by name as in `PRECISIONS`, "float32" first.
        recall_curve: by direction, R@k for k from 1 to 100, or to all candidates where there are fewer.
        chance_curve: the same for a random order.
        matching_similarities: (T,) cosines of the captions with their own images.
        other_similarities: cosines of captions with other images, of at most 2,000 of either.
        scores: scores of every query, to compare with another model's.
        misses: the captions whose images ranked lowest.
    """

    num_images: int
    num_texts: int
    width: int
    metrics: dict[str, Interval]
    chance: dict[str, float]
    diagnostics: Diagnostics
    by_width: dict[int, dict[str, float]]
    by_precision: dict[str, dict[str, float]]
    recall_curve: dict[str, list[float]]
    chance_curve: dict[str, list[float]]
    matching_similarities: np.ndarray
    other_similarities: np.ndarray
    scores: dict[str, QueryScores]
    misses: list[Miss]


def embed_split(encoder: DualEncoder, pairs: Dataset) -> Embeddings:
    """Embed every image and every caption of a split once.

    Args:
        encoder: the model.
        pairs: one row per image, as `load_pairs` returns them.

    Returns:
        The embeddings, in the order of the rows.

    Raises:
        ImageError: an image cannot be read.
        ValueError: images and captions are embedded in different widths.
    """
    rows = PairDataset(pairs)
    captions = rows.captions
    images = encoder.encode_images(pairs["image"])
    texts = encoder.encode_texts(captions)
    check_widths(encoder, images, texts)
    return Embeddings(images, texts, torch.tensor(rows.image_ids), captions, rows.image_of_captions())


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
        embeds: as `embed_split` returns them.
        logit_scale: the model's; its inverse, the temperature, is reported with the diagnostics.
        widths: also measure embeddings truncated to these widths.
        precisions: also measure embeddings rounded to these, of `PRECISIONS`.
        num_misses: number of lowest ranking captions to list.
        num_resamples: resamples of the intervals.

    Returns:
        The result.

    Raises:
        ValueError: a width is below 1 or above that of the embeddings.
    """
    full_width = embeds.images.shape[1]
    if any(not 1 <= width <= full_width for width in widths):
        raise ValueError(f"widths={list(widths)} are not all allowed; embeddings are {full_width} wide.")
    ids = embeds.text_image_ids, embeds.image_ids
    rankings = rank_candidates(embeds.images, embeds.texts, *ids, PRECISION_AT)
    scores = score_rankings(rankings, *ids)
    metrics = bootstrap_intervals(scores, num_resamples)
    values = {name: interval.value for name, interval in metrics.items()}
    by_width = {
        width: retrieval_metrics(truncate(embeds.images, width), truncate(embeds.texts, width), *ids)
        for width in sorted(set(widths) - {full_width})
    }
    by_precision = {
        name: retrieval_metrics(quantize(embeds.images, name), quantize(embeds.texts, name), *ids)
        for name in precisions
        if name != "float32"
    }
    matching_similarities, other_similarities = _similarities(embeds)
    chance = chance_metrics(*ids, recall_at=range(1, CURVE_END + 1))
    num_candidates = dict(zip(DIRECTIONS, (len(embeds.images), len(embeds.texts)), strict=True))
    ks = {direction: range(1, min(CURVE_END, number) + 1) for direction, number in num_candidates.items()}
    return RetrievalResult(
        num_images=len(embeds.images),
        num_texts=len(embeds.texts),
        width=full_width,
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
        matching_similarities=matching_similarities,
        other_similarities=other_similarities,
        scores=scores,
        misses=_misses(embeds, rankings[0], num_misses),
    )


def _similarities(embeds: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines of captions with their own images, and of some captions with some other images."""
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
