"""Exact ranks of a large set, both ways: how long, against the plain matrix product, and in how much memory?

    python benchmarks/ranking.py                    # 100,000 images, 500,000 captions, 256 wide: a quarter of an hour
    python benchmarks/ranking.py --num-images 10000

The product is numpy's, of as many images at a time as a gigabyte of similarities holds, and is thrown away. Both are
timed by turns in one process; the memory is the highest that the process ever held, embeddings included.
"""

import json
import resource
import statistics
import time
from typing import Annotated

import numpy as np
import torch
import typer

from clipmini.evaluation.retrieval import DIRECTIONS, QueryScores, rank_candidates, summarize_scores

CAPTIONS_PER_IMAGE = 5
PRODUCT_BYTES = 1 << 30


def make_embeddings(num_images: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw images, and captions near them, all of length 1."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(num_images).repeat_interleave(CAPTIONS_PER_IMAGE)
    images = torch.randn(num_images, width, generator=generator)
    texts = torch.randn(len(ids), width, generator=generator).mul_(4).add_(images[ids])
    for embeds in (images, texts):
        embeds.div_(embeds.norm(dim=1, keepdim=True))
    return images, texts, ids


def time_product(images: np.ndarray, texts: np.ndarray) -> float:
    """Multiply all images with all captions, a gigabyte of results at a time."""
    rows = max(1, PRODUCT_BYTES // (4 * len(texts)))
    out = np.empty((rows, len(texts)), dtype=np.float32)
    start_s = time.perf_counter()
    for start in range(0, len(images), rows):
        part = images[start : start + rows]
        np.matmul(part, texts.T, out=out[: len(part)])
    return time.perf_counter() - start_s


def main(
    num_images: Annotated[int, typer.Option(min=2, help="There are five captions for each.")] = 100_000,
    width: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 256,
    num_kept: Annotated[int, typer.Option(min=0, help="Answers to keep for each query; mAP@10 takes 10.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 1,
) -> None:
    """Time both and print what they took."""
    images, texts, ids = make_embeddings(num_images, width)
    times: dict[str, list[float]] = {"ranks": [], "product": []}
    for _ in range(repeats):
        start_s = time.perf_counter()
        rankings = rank_candidates(images, texts, ids, num_kept=num_kept)
        times["ranks"].append(time.perf_counter() - start_s)
        if not times["product"]:  # before the product has had a buffer of its own
            peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        times["product"].append(time_product(images.numpy(), texts.numpy()))
        print(json.dumps({name: round(values[-1], 1) for name, values in times.items()}), flush=True)
    scores = {
        direction: QueryScores(ranking.ranks, torch.full((len(own),), torch.nan), own)
        for direction, ranking, own in zip(DIRECTIONS, rankings, (ids, torch.arange(num_images)), strict=True)
    }
    ratios = [own / plain for own, plain in zip(times["ranks"], times["product"], strict=True)]
    print(
        json.dumps(
            {
                "num_images": num_images,
                "num_captions": len(ids),
                "width": width,
                "num_kept": num_kept,
                "threads": torch.get_num_threads(),
                "ranks_s": round(statistics.median(times["ranks"]), 1),
                "product_s": round(statistics.median(times["product"]), 1),
                "ratio": round(statistics.median(ratios), 2),
                "peak_gib": round(peak_gib, 2),
                "mean_recall": round(summarize_scores(scores)["mean_recall"], 4),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
