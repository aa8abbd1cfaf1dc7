"""The vector index of a table of images: none while exact search is fast, then one that compares a part of the table.

The index is Lance's IVF_RQ: vectors lie in partitions around centers, in 4 bits a dimension by RaBitQ (Gao and Long
2024, arXiv 2405.12497). A search looks into the partitions nearest to the query, its probes, and compares the best
that it finds there again, by whole vectors. How many probes are enough depends on the images and on the kind of query:
captions lie apart from all images, and need several times as many. So recall is measured, and decides.

A search asks the vector index only in the state that was measured, and compares all vectors otherwise: a run that is
killed between two writes makes searches slow, not wrong. Rows that the vector index lacks are compared in any case.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from lancedb.index import IvfRq

FLAT_VALUES = 25_600_000  # exact search compares as many in 0.06 s on 2 cores: 100,000 vectors of 256
NUM_BITS = 4  # with 1, ten times as many candidates must be compared again for the same recall
TOP = 10  # recall is that of so many hits
MIN_RECALL = 0.97
NUM_QUERIES = 256  # of each kind, by which recall is measured
REFINE_FACTORS = (5, 10, 20, 50)  # candidates that are compared again, for each hit
MAX_FRAGMENTS = 16  # small ones in a table, before they are joined
KEPT = timedelta(hours=1)  # for how long a search may go on reading what newer versions of the table have replaced
TIE = 1e-5  # a hit whose score differs by less from that of the last wanted one is as good


@dataclass(frozen=True)
class Tuning:
    """How the vector index of a table is asked, by kind of query; plain values, which the manifest keeps.

    Attributes:
        index_id: which state of the vector index was measured.
        num_trained: rows of the table when the centers were computed.
        num_measured: rows when recall was measured.
        num_probes: partitions to look into.
        refine_factor: candidates to compare again, for each hit.
        recall: the share of the exact best ten that was found, the mean of the sample.
    """

    index_id: str
    num_trained: int
    num_measured: int
    num_probes: dict[str, int]
    refine_factor: dict[str, int]
    recall: dict[str, float]


def nearest(
    table: Any, query: np.ndarray, kind: str, top: int, tuning: Tuning | None, where: str | None = None
) -> Any:
    """Return LanceDB's query for the rows that have the greatest product with a vector.

    Args:
        table: a LanceDB table.
        query: (W,) a vector of the width of the column `vector`.
        kind: "images" if it lies among the images', "words" if it is that of a caption.
        top: how many rows to find.
        tuning: from `update_vector_index`.
        where: a condition in SQL; few rows that fulfill it are compared exactly.
    """
    search = table.search(query, vector_column_name="vector").distance_type("dot").limit(top)
    if where is not None:
        search = search.where(where, prefilter=True)
    index = _find_index(table)
    if index is None or tuning is None or index.index_uuid != tuning.index_id or kind not in tuning.num_probes:
        return search.bypass_vector_index()
    if where is not None and table.count_rows(where) * len(query) <= FLAT_VALUES:
        return search.bypass_vector_index()
    num_probes = _num_partitions(tuning.num_trained)  # what fulfills a condition may lie in any partition
    if where is None:
        num_probes = min(num_probes, math.ceil(tuning.num_probes[kind] * max(1, top / TOP)))
    # Fewer hits than those whose recall was measured need as many candidates.
    return search.nprobes(num_probes).refine_factor(math.ceil(tuning.refine_factor[kind] * max(1, TOP / top)))


def update_vector_index(
    table: Any, num_dimensions: int, load_captions: Callable[[], np.ndarray | None], tuning: Tuning | None
) -> Tuning | None:
    """Build the vector index where it pays, put new rows into it, and measure it where it has changed.

    Other processes can search meanwhile. No other may write.

    Args:
        table: a LanceDB table with a column `vector`: lists of W float16, with W a multiple of 8.
        num_dimensions: as in `sample_queries`.
        load_captions: returns the captions of `sample_queries`; called only if recall is to be measured.
        tuning: what the last call returned.

    Returns:
        How to ask the vector index; None if all vectors are compared, since they are few.
    """
    width = table.schema.field("vector").type.list_size
    num_rows = table.count_rows()
    index = _find_index(table)
    is_fragmented = table.stats()["fragment_stats"]["num_small_fragments"] > MAX_FRAGMENTS
    if num_rows * width <= FLAT_VALUES:
        if index is not None:
            table.drop_index(index.name)
        if is_fragmented:
            table.optimize(cleanup_older_than=KEPT)
        return None
    if index is None or tuning is None or num_rows >= 2 * tuning.num_trained:
        if is_fragmented:
            table.optimize(cleanup_older_than=KEPT)
        config = IvfRq(distance_type="dot", num_partitions=_num_partitions(num_rows), num_bits=NUM_BITS)
        table.create_index("vector", config=config)
        return _measure(table, sample_queries(table, num_dimensions, load_captions()), num_rows)
    was_measured = index.index_uuid == tuning.index_id
    if is_fragmented or index.num_unindexed_rows * width > FLAT_VALUES / 10:
        table.optimize(cleanup_older_than=KEPT)  # makes a new index, with the same centers
    if was_measured and num_rows < 1.1 * tuning.num_measured:
        return replace(tuning, index_id=_find_index(table).index_uuid)
    return _measure(table, sample_queries(table, num_dimensions, load_captions()), tuning.num_trained)


def sample_queries(table: Any, num_dimensions: int, captions: np.ndarray | None) -> dict[str, np.ndarray]:
    """Draw queries of both kinds, by which to measure recall.

    Those of images are rows of the table, each moved by half its length in a random direction. Those of words are
    captions. Where none are known, rows stand in for them that are halved and then moved as captions are from images:
    all by one vector of length 1 (Liang et al. 2022, arXiv 2203.02053, found such a gap between the two), and each by
    half a length in a direction of its own.

    Args:
        table: a LanceDB table that is not empty.
        num_dimensions: D, of the model's embeddings, which are the first of each stored vector.
        captions: (N, D) embeddings of captions such as people will ask; None or empty if none are known.

    Returns:
        (N, W) queries by kind, N at most `NUM_QUERIES`, as `nearest` takes them; words are scored with priors.
    """
    generator = np.random.default_rng(0)
    num_rows, width = table.count_rows(), table.schema.field("vector").type.list_size
    chosen = generator.choice(num_rows, min(num_rows, NUM_QUERIES), replace=False)
    rows = stack(table.take_offsets(sorted(chosen.tolist())).select(["vector"]).to_arrow()["vector"])
    images = rows[:, :num_dimensions]

    def directions(num: int) -> np.ndarray:
        return _normalize(generator.standard_normal((num, num_dimensions), dtype=np.float32))

    if captions is None or not len(captions):
        captions = images / 2 + directions(1) + directions(len(images)) / 2
    elif len(captions) > NUM_QUERIES:
        captions = captions[generator.choice(len(captions), NUM_QUERIES, replace=False)]
    queries = {}
    for kind, embeds in (("images", images + directions(len(images)) / 2), ("words", captions)):
        queries[kind] = np.zeros((len(embeds), width), dtype=np.float32)
        queries[kind][:, :num_dimensions] = _normalize(embeds.astype(np.float32))
    if width > num_dimensions:
        queries["words"][:, num_dimensions] = 1  # see `Manifest.schema`
    return queries


def _measure(table: Any, queries: Mapping[str, np.ndarray], num_trained: int) -> Tuning:
    """Find what reaches `MIN_RECALL`, for each kind of query; a kind for which nothing does is left out."""
    tuning = Tuning(_find_index(table).index_uuid, num_trained, table.count_rows(), {}, {}, {})
    for kind, sample in queries.items():
        worst_scores = _worst_scores(table, sample)
        for refine_factor in REFINE_FACTORS:
            trial = replace(tuning, refine_factor={kind: refine_factor})
            found = _fewest_probes(table, kind, sample, worst_scores, trial)
            if found is not None:
                tuning.num_probes[kind], tuning.recall[kind] = found
                tuning.refine_factor[kind] = refine_factor
                break
    return tuning


def _fewest_probes(
    table: Any, kind: str, sample: np.ndarray, worst_scores: np.ndarray, tuning: Tuning
) -> tuple[int, float] | None:
    """Return the fewest probes with which recall is surely high enough, and the recall; None if all are too few."""
    num_partitions = _num_partitions(tuning.num_trained)
    steps = np.geomspace(1, num_partitions, 3 * num_partitions.bit_length()).round().astype(int)
    recalls: dict[int, float] = {}

    def is_enough(num_probes: int) -> bool:
        trial = replace(tuning, num_probes={kind: int(num_probes)})
        shares = np.empty(len(sample))
        for number, (query, worst_score) in enumerate(zip(sample, worst_scores, strict=True)):
            rows = nearest(table, query, kind, TOP, trial).select(["vector", "_distance"]).to_arrow()
            shares[number] = np.sum(stack(rows["vector"]) @ query >= worst_score - TIE) / TOP
        recalls[int(num_probes)] = float(shares.mean())
        return shares.mean() - 2 * shares.std() / math.sqrt(len(shares)) >= MIN_RECALL

    place = bisect_left(steps, True, key=is_enough)
    return None if place == len(steps) else (int(steps[place]), round(recalls[int(steps[place])], 4))


def _worst_scores(table: Any, sample: np.ndarray) -> np.ndarray:
    """Return the product of each query with the last of its exact best ten: (N,). It decides also among equal rows."""
    best = np.full((len(sample), TOP), -np.inf, dtype=np.float32)
    for batch in table.search().select(["vector"]).to_batches():
        scores = sample @ stack(batch["vector"]).T
        best = np.partition(np.concatenate([best, scores], axis=1), -TOP, axis=1)[:, -TOP:]
    return best.min(axis=1)


def _find_index(table: Any) -> Any:
    return next((index for index in table.list_indices() if index.columns == ["vector"]), None)


def _num_partitions(num_rows: int) -> int:
    return max(1, round(math.sqrt(num_rows)))


def _normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stack(vectors: Any, dtype: Any = np.float32) -> np.ndarray:
    """Return the (N, W) numbers of a column of N vectors."""
    vectors = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    return vectors.flatten().to_numpy().astype(dtype).reshape(-1, vectors.type.list_size)
