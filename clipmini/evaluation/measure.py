"""Measure retrieval over a whole split: every image and caption embedded once, recalls with intervals, failures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.data.pairs import PairDataset
from clipmini.inference.encode import encode_images, encode_texts
from clipmini.inference.encoders import DualEncoder, check_widths
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.modeling_clipmini import normalize

from .diagnostics import Diagnostics, cut_off, diagnose, quantize
from .intervals import Interval, bootstrap_intervals
from .retrieval import (
    DIRECTIONS,
    PRECISION_AT,
    QueryScores,
    Ranking,
    chance_metrics,
    rank_answers,
    retrieval_metrics,
    retrieval_scores,
    score_rankings,
    summarize_scores,
)

CACHED_CHUNK_SIZE = 8192  # rows of cached features projected at once


def embed_pairs(
    model: ClipMiniModel, processor: ClipMiniProcessor, pairs: Dataset | PairDataset, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Embed all images and all captions of a pair data set.

    Args:
        model: in eval mode.
        processor: the model's processor.
        pairs: one row per image; of cached features the first view is taken.
        batch_size: images per forward; captions go eight times as many at once.

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
    """Measure retrieval on a whole split with all captions of every image; see `retrieval_metrics`.

    Args:
        model: put in eval mode for the time of the measurement.
        processor: the model's processor.
        pairs: one row per image.
        batch_size: images per forward.
        widths: measure embeddings cut off at these widths as well.

    Returns:
        `text_to_image_r1`, ..., `mean_recall`, in [0, 1]; and for each width the same with `_at_{width}` behind.
    """
    scored = _score_split(model, processor, pairs, batch_size, widths)
    return {
        f"{name}{suffix}": value
        for suffix, scores in scored.items()
        for name, value in summarize_scores(scores).items()
    }


def evaluate_with_intervals(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | PairDataset,
    batch_size: int = 16,
    widths: Sequence[int] = (),
) -> dict[str, Interval]:
    """Measure as `evaluate_retrieval` does, and give each metric with its 95 % bootstrap interval over images."""
    scored = _score_split(model, processor, pairs, batch_size, widths)
    return {
        f"{name}{suffix}": interval
        for suffix, scores in scored.items()
        for name, interval in bootstrap_intervals(scores).items()
    }


def _score_split(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset | PairDataset,
    batch_size: int,
    widths: Sequence[int],
) -> dict[str, dict[str, QueryScores]]:
    """Score the queries of a split: of whole embeddings under "", of cut-off ones under "_at_{width}"."""
    with eval_mode(model):
        image_embeds, text_embeds = embed_pairs(model, processor, pairs, batch_size)
    ids = _ids(pairs)
    scored = {"": retrieval_scores(image_embeds, text_embeds, *ids)}
    for width in widths:
        image, text = (normalize(embeds[:, :width]) for embeds in (image_embeds, text_embeds))
        scored[f"_at_{width}"] = retrieval_scores(image, text, *ids)
    return scored


def chance_level(pairs: Dataset | PairDataset) -> dict[str, float]:
    """Give what a random order reaches on the same split, under the same keys."""
    return chance_metrics(*_ids(pairs))


def _ids(pairs: Dataset | PairDataset) -> tuple[Tensor, Tensor]:
    """Give the image ids of all captions and of all rows; copies of an image may share theirs."""
    cached = _cached(pairs)
    image_ids = torch.tensor(cached.image_ids)
    return image_ids[cached.image_of_captions()], image_ids


def _cached(pairs: Dataset | PairDataset) -> PairDataset:
    return pairs if isinstance(pairs, PairDataset) else PairDataset(pairs)


@torch.no_grad()
def _embed_features(model: ClipMiniModel, features: np.ndarray, name: str, batch_size: int) -> Tensor:
    """Pass cached features through what remains of their tower."""
    results = []
    for start in range(0, len(features), batch_size):
        batch = torch.tensor(features[start : start + batch_size], dtype=torch.float32, device=model.device)
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        output = model(**{name: batch})
        embeds = output.text_embeds if name == "pooled_text" else output.image_embeds
        results.append(embeds.float().cpu())
    return torch.cat(results)


CURVE_END = 100  # the last k of a recall curve
MAX_COMPARED = 2000  # images, and captions, whose similarities the histogram of non-matches counts


@dataclass(frozen=True)
class Embeddings:
    """A split's images and captions in a model's space.

    Attributes:
        images: (I, D) float32, each of length 1.
        texts: (T, D) likewise, captions in the order of the rows.
        image_ids: (I,) integers; copies that share an id share it here.
        text_image_ids: (T,) the id of each caption's image.
        captions: the T captions.
        row_of_text: (T,) the row of each caption's image.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_image_ids: Tensor
    captions: list[str]
    row_of_text: Tensor

    def without(self, rows: Sequence[int], texts: Sequence[int]) -> "Embeddings":
        """Leave out some images with all their captions, and some captions more."""
        keeps_image = torch.ones(len(self.images), dtype=torch.bool)
        keeps_image[torch.tensor(list(rows), dtype=torch.long)] = False
        keeps_text = keeps_image[self.row_of_text]
        keeps_text[torch.tensor(list(texts), dtype=torch.long)] = False
        new_row = keeps_image.cumsum(dim=0) - 1
        return Embeddings(
            images=self.images[keeps_image],
            texts=self.texts[keeps_text],
            image_ids=self.image_ids[keeps_image],
            text_image_ids=self.text_image_ids[keeps_text],
            captions=[caption for caption, keeps in zip(self.captions, keeps_text.tolist(), strict=True) if keeps],
            row_of_text=new_row[self.row_of_text[keeps_text]],
        )


@dataclass(frozen=True)
class Miss:
    """A caption whose image came late.

    Attributes:
        caption: what was asked.
        row: the row of its image.
        rank: that image's place, 1 being first.
        similarity: its cosine with the caption.
        beaten_by: rows of the images that came first, with their cosines.
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
        metrics: by name as in `summarize_scores`, with 95 % intervals.
        chance: recalls of a random order, under the same names.
        diagnostics: the shape of the shared space.
        by_width: metrics of embeddings cut off at some widths, the whole width last.
        by_precision: metrics of embeddings rounded to fewer bits, by name as in `PRECISIONS`, "float32" first.
        recall_curve: for each direction R@k for k from 1 to 100, or to all answers where there are fewer.
        chance_curve: the same of a random order.
        own_similarities: (P,) cosines of the captions and their own images.
        other_similarities: cosines of captions and other images, of at most 2,000 of either.
        scores: of every query, to be compared with another model's.
        misses: the captions whose images came latest.
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
    own_similarities: np.ndarray
    other_similarities: np.ndarray
    scores: dict[str, QueryScores]
    misses: list[Miss]


def embed_split(encoder: DualEncoder, pairs: Dataset, batch_size: int = 16) -> Embeddings:
    """Embed every image and every caption of a split once.

    Args:
        encoder: the model.
        pairs: one row per image, as `load_pairs` gives.
        batch_size: images per forward; captions go eight times as many at once.

    Returns:
        The embeddings, in the order of the rows.

    Raises:
        ImageError: an image cannot be read.
        ValueError: images and captions are embedded in different widths.
    """
    rows = PairDataset(pairs)
    image_ids, row_of_text = torch.tensor(pairs["image_id"][:]), rows.image_of_captions()
    captions = rows.captions
    images = encoder.encode_images(pairs["image"], batch_size)
    texts = encoder.encode_texts(captions, 8 * batch_size)
    check_widths(encoder, images, texts)
    return Embeddings(images, texts, image_ids, image_ids[row_of_text], captions, row_of_text)


def measure_retrieval(
    embeds: Embeddings,
    *,
    temperature: float | None = None,
    widths: Sequence[int] = (),
    precisions: Sequence[str] = (),
    num_misses: int = 20,
    num_resamples: int = 1000,
) -> RetrievalResult:
    """Measure retrieval, all captions of every image against all images and the other way round.

    Args:
        embeds: as `embed_split` gives.
        temperature: the model's, to be told with the diagnostics.
        widths: measure embeddings cut off at these widths as well.
        precisions: measure embeddings rounded to these as well, of `PRECISIONS`.
        num_misses: captions to list whose images came latest.
        num_resamples: resamples of the intervals.

    Returns:
        The result.

    Raises:
        ValueError: a width is larger than the embeddings' own, or below 1.
    """
    full_width = embeds.images.shape[1]
    if any(not 1 <= width <= full_width for width in widths):
        raise ValueError(f"widths={list(widths)} are not all allowed; embeddings are {full_width} wide.")
    ids = embeds.text_image_ids, embeds.image_ids
    rankings = rank_answers(embeds.images, embeds.texts, *ids, PRECISION_AT)
    scores = score_rankings(rankings, *ids)
    metrics = bootstrap_intervals(scores, num_resamples)
    whole = {name: interval.value for name, interval in metrics.items()}

    def metrics_of(images: Tensor, texts: Tensor) -> dict[str, float]:
        return retrieval_metrics(images, texts, *ids)

    own, others = _similarities(embeds)
    by_chance = chance_metrics(*ids, recall_at=range(1, CURVE_END + 1))
    num_answers = dict(zip(DIRECTIONS, (len(embeds.images), len(embeds.texts)), strict=True))
    places = {direction: range(1, min(CURVE_END, number) + 1) for direction, number in num_answers.items()}
    return RetrievalResult(
        num_images=len(embeds.images),
        num_texts=len(embeds.texts),
        width=full_width,
        metrics=metrics,
        chance=chance_metrics(*ids),
        diagnostics=diagnose(embeds.images, embeds.texts, *ids, temperature),
        by_width={
            **{
                width: metrics_of(cut_off(embeds.images, width), cut_off(embeds.texts, width))
                for width in sorted(set(widths) - {full_width})
            },
            full_width: whole,
        },
        by_precision={
            "float32": whole,
            **{
                name: metrics_of(quantize(embeds.images, name), quantize(embeds.texts, name))
                for name in precisions
                if name != "float32"
            },
        },
        recall_curve={
            direction: [(score.ranks < k).double().mean().item() for k in places[direction]]
            for direction, score in scores.items()
        },
        chance_curve={direction: [by_chance[f"{direction}_r{k}"] for k in ks] for direction, ks in places.items()},
        own_similarities=own,
        other_similarities=others,
        scores=scores,
        misses=_misses(embeds, rankings[0], num_misses),
    )


def _similarities(embeds: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Give cosines of captions with their own images, and of some captions with some other images."""
    own = (embeds.texts * embeds.images[embeds.row_of_text]).sum(dim=1)
    draw = torch.Generator().manual_seed(0)
    texts, images = (
        torch.randperm(len(rows), generator=draw)[:MAX_COMPARED] for rows in (embeds.texts, embeds.images)
    )
    similarity = embeds.texts[texts] @ embeds.images[images].T
    is_other = embeds.text_image_ids[texts, None] != embeds.image_ids[None, images]
    return own.numpy(), similarity[is_other].numpy()


def _misses(embeds: Embeddings, ranking: Ranking, num_misses: int) -> list[Miss]:
    latest = ranking.ranks.argsort(descending=True, stable=True)[:num_misses]
    misses = []
    for text in latest.tolist():
        rank = int(ranking.ranks[text])
        if rank < 1:
            break  # the rest were found
        row = int(embeds.row_of_text[text])
        pairs = zip(ranking.other_rows[text].tolist(), ranking.others[text].tolist(), strict=True)
        beaten_by = [(other, similarity) for other, similarity in pairs if other >= 0][:rank]
        misses.append(Miss(embeds.captions[text], row, rank + 1, ranking.own[text, 0].item(), beaten_by))
    return misses
