"""Measure retrieval over a whole split, from a model and its data to results: training and `evaluate` both do it here.

Every image and caption is embedded once. Where frozen parts of the towers have run already, their features are used.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from clipmini.data.pairs import PairDataset
from clipmini.inference.bank import Bank
from clipmini.inference.embed import DualEncoder
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

logger = logging.getLogger(__name__)

Metric = TypeVar("Metric")
PROJECTED_AT_ONCE = 8192  # pooled outputs of a tower that only its projection has to process
NUM_BANK_TEXTS, NUM_BANK_IMAGES = 10_000, 3_000  # larger banks gain little; see benchmarks/bank.py
MIN_BANK = 1_000  # captions, and images: smaller banks gain nothing that is sure, and banks of a hundred harm
CURVE_END = 100  # the last k of a recall curve
MAX_COMPARED = 2000  # images, and captions, in the histogram of similarities that do not match
NUM_EXAMPLES = 8  # successes to look at, and as many failures
NUM_WORST = 10
NUM_FOUND = 4  # images to show of each query


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

    def normalized(self, bank: Bank) -> "Embeddings":
        """Widen the vectors by two, so that their products are scores without hubs in both directions.

        The score of a pair is its cosine minus the priors of its image and its caption. To the images that a caption
        ranks, its own prior is a constant and changes nothing; and likewise for an image.
        """
        ones = torch.ones(max(len(self.images), len(self.texts)), 1)
        of_images, of_texts = bank.prior_of_images(self.images)[:, None], bank.prior_of_texts(self.texts)[:, None]
        return replace(
            self,
            images=torch.cat([self.images, -of_images, ones[: len(of_images)]], dim=1),
            texts=torch.cat([self.texts, ones[: len(of_texts)], -of_texts], dim=1),
        )

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
class Found:
    """An image in the ranking of a caption.

    Attributes:
        row: the image's row.
        rank: from 1.
        similarity: the image's cosine with the caption.
        is_correct: whether the caption describes it.
    """

    row: int
    rank: int
    similarity: float
    is_correct: bool


@dataclass(frozen=True)
class Answer:
    """What a caption found.

    Attributes:
        caption: the query.
        found: the first `NUM_FOUND` images; if its own is not among them, it takes the place of the last.
    """

    caption: str
    found: list[Found]


@dataclass(frozen=True)
class Answers:
    """What some captions of a split found, to be looked at.

    Attributes:
        num_queries: number of all captions.
        num_right: number of those that ranked their image first.
        right: some of these, chosen by `pick_examples`.
        wrong: some of the others, chosen likewise.
        worst: the captions whose images ranked lowest, the lowest first.
    """

    num_queries: int
    num_right: int
    right: list[Answer]
    wrong: list[Answer]
    worst: list[Answer]


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
        never_first: as `share_never_first` returns it.
        answers: what some of the captions found.
    """

    metrics: dict[str, Interval]
    chance: dict[str, float]
    diagnostics: Diagnostics
    by_width: dict[int, dict[str, float]]
    by_precision: dict[str, dict[str, float]]
    recall_curve: dict[str, list[float]]
    chance_curve: dict[str, list[float]]
    scores: dict[str, QueryScores]
    never_first: float
    answers: Answers


@dataclass(frozen=True)
class NormalizedResult:
    """A model's retrieval on a split by scores without hubs.

    Attributes:
        metrics: as in `summarize_scores`, with 95 % intervals.
        scores: scores of every query, to compare with those by cosine.
        never_first: as `share_never_first` returns it.
    """

    metrics: dict[str, Interval]
    scores: dict[str, QueryScores]
    never_first: float


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
    images = _embed_images(encoder, data, range(len(data)), batch_size)
    texts = _embed_captions(encoder, data, range(data.num_captions.sum()), batch_size)
    return Embeddings(images, texts, torch.tensor(data.image_ids), data.captions, data.image_of_captions())


def draw_bank(model: ClipMiniModel, pairs: PairDataset, seed: int, batch_size: int = 16) -> Bank | None:
    """Draw training captions and images at random, and embed them.

    Args:
        model: with its processor.
        pairs: the training split, with features as in `embed_pairs`.
        seed: of the draw.
        batch_size: images per forward pass.

    Returns:
        A bank of `NUM_BANK_TEXTS` captions and `NUM_BANK_IMAGES` images, or of all where there are fewer. None where
        there are fewer than `MIN_BANK` of either.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the model returns vectors that are NaN.
    """
    num_captions, num_images = int(pairs.num_captions.sum()), len(pairs)
    if min(num_captions, num_images) < MIN_BANK:
        logger.info("no bank: it takes %d training captions, and as many images", MIN_BANK)
        return None
    encoder, generator = DualEncoder(model), torch.Generator().manual_seed(seed)
    texts = torch.randperm(num_captions, generator=generator)[:NUM_BANK_TEXTS].tolist()
    images = torch.randperm(num_images, generator=generator)[:NUM_BANK_IMAGES].tolist()
    return Bank(
        _embed_captions(encoder, pairs, texts, batch_size).half(),
        _embed_images(encoder, pairs, images, batch_size).half(),
        model.get_logit_scale().item(),
    )


def _embed_images(encoder: DualEncoder, data: PairDataset, rows: Sequence[int], batch_size: int) -> Tensor:
    """Embed the images of some rows, from their features if there are any: (len(rows), D), of length 1."""
    model: Any = encoder.model

    def embed_features(some: list[int]) -> Tensor:
        assert data.image_features is not None
        batch = torch.tensor(data.image_features[some, 0], dtype=torch.float32, device=model.device)
        pooled = batch if data.frozen_stages is None else data.frozen_stages.resume(model, batch)
        return model.get_image_features(pooled_image=pooled).pooler_output

    with eval_mode(model):
        if data.image_features is None:
            return encoder.encode_images(data.rows.select(rows)["image"], batch_size)
        size = PROJECTED_AT_ONCE if data.frozen_stages is None else batch_size
        return normalize(embed_in_batches(rows, embed_features, size))


def _embed_captions(encoder: DualEncoder, data: PairDataset, indices: Sequence[int], batch_size: int) -> Tensor:
    """Embed some of all captions, from their features if there are any: (len(indices), D), of length 1."""
    model: Any = encoder.model

    def embed_features(some: list[int]) -> Tensor:
        assert data.text_features is not None
        batch = torch.tensor(data.text_features[some], dtype=torch.float32, device=model.device)
        return model.get_text_features(pooled_text=batch).pooler_output

    with eval_mode(model):
        if data.text_features is None:
            captions = data.captions
            return encoder.encode_texts([captions[index] for index in indices], 8 * batch_size)
        return normalize(embed_in_batches(indices, embed_features, PROJECTED_AT_ONCE))


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
    embeds = embed_pairs(DualEncoder(model), pairs, batch_size)
    return _at_widths(embeds, embeds.scores(), widths, summarize_scores)


def measure_split(
    model: ClipMiniModel,
    pairs: Dataset | PairDataset,
    batch_size: int = 16,
    widths: Sequence[int] = (),
    bank: Bank | None = None,
) -> tuple[dict[str, Any], Answers]:
    """Measure retrieval on a split with intervals; arguments as in `measure_pairs`, and a bank to score without hubs.

    Returns:
        In the form of `results.json`, `num_images`, `num_captions`, and by metric `chance`, `after` training, and
        `intervals` of the latter; with a bank also `normalized`, `normalized_intervals` and `never_first`. And what
        some of the captions found.
    """
    embeds = embed_pairs(DualEncoder(model), pairs, batch_size)
    ids = embeds.text_image_ids, embeds.image_ids
    rankings = rank_candidates(embeds.images, embeds.texts, *ids, PRECISION_AT)
    metrics = _at_widths(embeds, score_rankings(rankings, *ids), widths, bootstrap_intervals)
    facts = {
        "num_images": len(embeds.images),
        "num_captions": len(embeds.texts),
        "chance": chance_metrics(*ids),
        "after": {name: interval.value for name, interval in metrics.items()},
        "intervals": interval_ends(metrics),
    }
    if bank is not None:
        result = measure_normalized(embeds, bank)
        by_cosine = share_never_first(embeds, rankings[0])
        facts |= {
            "normalized": {name: interval.value for name, interval in result.metrics.items()},
            "normalized_intervals": interval_ends(result.metrics),
            "never_first": {"cosine": by_cosine, "normalized": result.never_first},
        }
    return facts, _pick_answers(embeds, rankings[0])


def _at_widths(
    embeds: Embeddings,
    scores: dict[str, QueryScores],
    widths: Sequence[int],
    summarize: Callable[[dict[str, QueryScores]], Mapping[str, Metric]],
) -> dict[str, Metric]:
    """Summarize the scores of whole embeddings, and of truncated ones under names that end in their width."""
    metrics = dict(summarize(scores))
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
    num_resamples: int = 1000,
) -> RetrievalResult:
    """Measure retrieval in both directions, all captions of every image against all images and vice versa.

    Args:
        embeds: as `embed_pairs` returns them.
        logit_scale: the model's; its inverse, the temperature, is reported with the diagnostics.
        widths: also measure embeddings truncated to these widths.
        precisions: also measure embeddings rounded to these, of `PRECISIONS`.
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
        never_first=share_never_first(embeds, rankings[0]),
        answers=_pick_answers(embeds, rankings[0]),
    )


def measure_normalized(embeds: Embeddings, bank: Bank) -> NormalizedResult:
    """Measure retrieval by scores without hubs, with the bank of the model that embedded images and captions."""
    widened, ids = embeds.normalized(bank), (embeds.text_image_ids, embeds.image_ids)
    rankings = rank_candidates(widened.images, widened.texts, *ids, PRECISION_AT)
    scores = score_rankings(rankings, *ids)
    return NormalizedResult(bootstrap_intervals(scores), scores, share_never_first(embeds, rankings[0]))


def share_never_first(embeds: Embeddings, ranking: Ranking) -> float:
    """Return the share of images that no caption ranks first, in [0, 1]: small where there are no hubs.

    Args:
        embeds: the images and captions.
        ranking: of the images for each caption, with one wrong image or more of each.
    """
    first = torch.where(ranking.ranks == 0, embeds.row_of_text, ranking.wrong_rows[:, 0])
    return 1 - len(first.unique()) / len(embeds.images)


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


def pick_examples(is_right: Tensor) -> tuple[list[int], list[int]]:
    """Pick successes and as many failures, without looking at them.

    All queries are put in one random order, which depends on their number alone; the first successes and the first
    failures are picked. Two models are therefore shown by the same queries, as far as they answer them alike.

    Args:
        is_right: (Q,) whether each query was answered right.

    Returns:
        The indices of up to `NUM_EXAMPLES` successes, and those of as many failures; if there is none of either kind,
        up to `NUM_EXAMPLES` of the other.
    """
    order = torch.randperm(len(is_right), generator=torch.Generator().manual_seed(0))
    right, wrong = order[is_right[order]].tolist(), order[~is_right[order]].tolist()
    number = min(NUM_EXAMPLES, len(right), len(wrong)) or NUM_EXAMPLES
    return right[:number], wrong[:number]


def _pick_answers(embeds: Embeddings, ranking: Ranking) -> Answers:
    is_right = ranking.ranks == 0
    right, wrong = pick_examples(is_right)
    lowest = ranking.ranks.argsort(descending=True, stable=True)[:NUM_WORST].tolist()

    def answers(texts: list[int]) -> list[Answer]:
        return [_answer(embeds, ranking, text) for text in texts]

    worst = [text for text in lowest if not is_right[text]]
    return Answers(len(is_right), int(is_right.sum()), answers(right), answers(wrong), answers(worst))


def _answer(embeds: Embeddings, ranking: Ranking, text: int) -> Answer:
    rank = int(ranking.ranks[text])  # from 0: the number of wrong images before the correct one
    others = zip(ranking.wrong_rows[text].tolist(), ranking.wrong[text].tolist(), strict=True)
    wrong = [(row, similarity) for row, similarity in others if row >= 0][: NUM_FOUND - 1]
    found = [Found(row, place, similarity, False) for place, (row, similarity) in enumerate(wrong[:rank], start=1)]
    found.append(Found(int(embeds.row_of_text[text]), rank + 1, ranking.correct[text, 0].item(), True))
    found += [
        Found(row, place, similarity, False) for place, (row, similarity) in enumerate(wrong[rank:], start=rank + 2)
    ]
    return Answer(embeds.captions[text], found)
