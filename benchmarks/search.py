"""How fast, how exact and how large is the vector index of a million images, beside FAISS's exact search?

    python benchmarks/search.py                       # 1,000,000 vectors: a quarter of an hour on 2 cores
    python benchmarks/search.py --num-vectors 100000 --json

The vectors have length 1 and 256 dimensions: 1,000 centers, and 0.06 of noise per dimension. Queries are drawn alike,
or displaced as captions are from images: half such a vector, plus a constant one of length 1, plus 0.03 of noise,
normalized. Recall is that of the exact ten best; the index chose its probes by rows of its own and other displaced
queries. FAISS is asked where faiss-cpu is installed; it holds the same vectors in float32.
"""

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import lancedb
import numpy as np
import pyarrow as pa
import typer

from clipmini.indexing import vectors as vector_index

WIDTH = 256
NUM_CENTERS = 1000
CHUNK = 50_000
NUM_EXACT = 50  # queries by which exact search in Lance is timed


class Maker:
    """Draw vectors of length 1 around the same centers."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        self._centers = _normalize(self._noise(NUM_CENTERS))
        self._constant = _normalize(self._noise(1))

    def _noise(self, num: int) -> np.ndarray:
        return self._generator.standard_normal((num, WIDTH), dtype=np.float32)

    def alike(self, num: int) -> np.ndarray:
        """Return (num, 256) vectors, as the images' are."""
        centers = self._centers[self._generator.integers(NUM_CENTERS, size=num)]
        return _normalize(centers + 0.06 * self._noise(num))

    def displaced(self, num: int) -> np.ndarray:
        """Return (num, 256) vectors, displaced as captions' are."""
        return _normalize(self.alike(num) / 2 + self._constant + 0.03 * self._noise(num))


def _normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _make_table(folder: str, maker: Maker, num_vectors: int) -> Any:
    schema = pa.schema({"key": pa.int64(), "vector": pa.list_(pa.float16(), WIDTH)})

    def batches() -> Any:
        for start in range(0, num_vectors, CHUNK):
            vectors = maker.alike(min(CHUNK, num_vectors - start)).astype(np.float16)
            keys = pa.array(range(start, start + len(vectors)))
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
            yield pa.record_batch([keys, column], schema=schema)

    return lancedb.connect(folder).create_table("images", batches(), schema=schema)


def _ask(search: Callable[[np.ndarray], set[int]], queries: np.ndarray) -> tuple[list[set[int]], dict[str, float]]:
    """Search by one query after the other; return the keys found, and how long the middle and the slowest took."""
    found, times_ms = [], []
    for query in queries:
        start_s = time.perf_counter()
        found.append(search(query))
        times_ms.append(1000 * (time.perf_counter() - start_s))
    cuts = statistics.quantiles(times_ms, n=20)
    return found, {"p50_ms": round(statistics.median(times_ms), 1), "p95_ms": round(cuts[-1], 1)}


def _find_exactly(table: Any, queries: np.ndarray) -> list[set[int]]:
    """Return the keys of the ten vectors that have the greatest products with each query."""
    best_scores, best_keys = np.empty((2, len(queries), 0))
    for batch in table.search().select(["key", "vector"]).to_batches():
        vectors = batch["vector"].flatten().to_numpy().astype(np.float32).reshape(-1, WIDTH)
        scores = np.concatenate([best_scores, queries @ vectors.T], axis=1)
        keys = np.broadcast_to(batch["key"].to_numpy(), (len(queries), len(vectors)))
        keys = np.concatenate([best_keys, keys], axis=1)
        places = np.argpartition(-scores, 9, axis=1)[:, :10]
        best_scores, best_keys = (np.take_along_axis(values, places, axis=1) for values in (scores, keys))
    return [set(row.astype(int).tolist()) for row in best_keys]


def main(
    num_vectors: Annotated[int, typer.Option(min=1000, help="How many vectors to search in.")] = 1_000_000,
    num_queries: Annotated[int, typer.Option(min=2, help="How many queries of each kind.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Build the index, ask it, and print what both took."""
    maker = Maker()
    with tempfile.TemporaryDirectory() as folder:
        table = _make_table(folder, maker, num_vectors)
        queries = {"images": maker.alike(num_queries), "words": maker.displaced(num_queries)}
        captions = maker.displaced(vector_index.NUM_QUERIES)
        start_s = time.perf_counter()
        tuning = vector_index.update_vector_index(table, WIDTH, lambda: captions, None)
        build_s = time.perf_counter() - start_s
        bytes_on_disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())

        def search(query: np.ndarray, kind: str, tuning: vector_index.Tuning | None) -> set[int]:
            rows = vector_index.nearest(table, query, kind, 10, tuning).select(["key", "_distance"]).to_arrow()
            return set(rows["key"].to_pylist())

        report: dict[str, Any] = {
            "num_vectors": num_vectors,
            "num_queries": num_queries,
            "build_s": round(build_s, 1),
            "bytes_on_disk": bytes_on_disk,
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[2], 1),
        }
        rows: list[dict[str, Any]] = []
        answers = {}
        for kind in queries:
            answers[kind], times = _ask(lambda query, kind=kind: search(query, kind, tuning), queries[kind])
            chosen = (
                {} if tuning is None else {"probes": tuning.num_probes[kind], "refine": tuning.refine_factor[kind]}
            )
            rows.append({"search": "clipmini", "queries": kind, **times, **chosen})
        report["peak_gib"] = round(_peak_gib(), 2)  # before exact search and FAISS take theirs
        for kind, row in zip(queries, list(rows), strict=True):
            best = _find_exactly(table, queries[kind])
            shares = [len(keys & wanted) / 10 for keys, wanted in zip(answers[kind], best, strict=True)]
            row["recall_at_10"] = round(statistics.mean(shares), 4)
            _, times = _ask(lambda query, kind=kind: search(query, kind, None), queries[kind][:NUM_EXACT])
            rows.append({"search": "Lance, exact", "queries": kind, **times, "recall_at_10": 1.0})
        try:
            import faiss
        except ImportError:
            print("FAISS is left out: pip install faiss-cpu")
        else:
            flat = faiss.IndexFlatIP(WIDTH)
            for batch in table.search().select(["vector"]).to_batches():
                flat.add(batch["vector"].flatten().to_numpy().reshape(-1, WIDTH).astype(np.float32))
            for kind in queries:
                _, times = _ask(lambda query: set(flat.search(query[None], 10)[1][0].tolist()), queries[kind])
                rows.append({"search": "FAISS flat", "queries": kind, **times, "recall_at_10": 1.0})
    if as_json:
        print(json.dumps({**report, "searches": rows}))
        return
    print(json.dumps(report))
    print("| search | queries | recall@10 | p50 ms | p95 ms | probes |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = (row[name] for name in ("search", "queries", "recall_at_10", "p50_ms", "p95_ms"))
        print("| " + " | ".join(map(str, cells)) + f" | {row.get('probes', '')} |")


if __name__ == "__main__":
    typer.run(main)
