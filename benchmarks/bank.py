"""Scores without hubs: what a bank gains in recall, by its size, on the data of training and on other images.

    python benchmarks/bank.py runs/flickr8k/model --source FOLDER --gallery offline:photos   # minutes, to embed
    python benchmarks/bank.py runs/demo-*/model --source offline:photos --split test         # one model a seed

Banks are drawn at random from the train split of SOURCE, `--draws` times of each size, up to all that it has. Figures
are means over models and draws, in percent. A gallery is ranked whole, whatever its splits, with the bank of SOURCE.
The intervals are paired: normalized minus cosine, on the same resamples of images.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import concatenate_datasets
from safetensors.torch import load_file, save_file

from clipmini.data.pairs import load_pairs
from clipmini.evaluation.intervals import paired_bootstrap
from clipmini.evaluation.measure import (
    NUM_BANK_IMAGES,
    NUM_BANK_TEXTS,
    Embeddings,
    embed_pairs,
    measure_normalized,
    share_never_first,
)
from clipmini.evaluation.retrieval import DIRECTIONS, PRECISION_AT, rank_candidates, score_rankings
from clipmini.inference.bank import Bank
from clipmini.inference.embed import DualEncoder
from clipmini.inference.encoders import load_encoder
from clipmini.store import digest

TEXT_SIZES, IMAGE_SIZES = (100, 500, 1000, 3000, 10_000, 30_000), (100, 500, 1000, 3000, 6000)
COLUMNS = (
    *("ranked", "captions", "images"),
    *("text to image R@1, cosine", "normalized", "difference"),
    *("image to text R@1, cosine", "normalized", "difference"),
    *("never first, cosine", "normalized"),
)


def embed_split(encoder: DualEncoder, source: str, split: str | None, cache: Path | None) -> Embeddings:
    """Embed a split, or all splits as one for None; vectors are found in `cache` if they were kept there."""
    name = digest(str(encoder.weights_sha256), str(Path(source).absolute()), str(split)).hex()
    file = None if cache is None else cache / f"{name}.safetensors"
    if file is not None and file.exists():
        kept = load_file(file)
        return Embeddings(kept["images"], kept["texts"], kept["ids"], [], kept["rows"])
    splits = load_pairs(source)
    rows = concatenate_datasets(list(splits.values())) if split is None else splits[split]
    embeds = embed_pairs(encoder, rows)
    if split is None:  # ids count from 0 in each split
        embeds = Embeddings(
            embeds.images, embeds.texts, torch.arange(len(embeds.images)), embeds.captions, embeds.row_of_text
        )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        vectors = {"images": embeds.images, "texts": embeds.texts, "ids": embeds.image_ids, "rows": embeds.row_of_text}
        save_file(vectors, file)
    return embeds


@dataclass
class Ranked:
    """What is ranked with banks, and what it is by cosine."""

    embeds: Embeddings

    def __post_init__(self) -> None:
        embeds = self.embeds
        ids = embeds.text_image_ids, embeds.image_ids
        rankings = rank_candidates(embeds.images, embeds.texts, *ids, PRECISION_AT)
        self.scores, self.never_first = score_rankings(rankings, *ids), share_never_first(embeds, rankings[0])

    def compare(self, bank: Bank) -> dict[str, Any]:
        """Return R@1 by cosine and normalized, their paired differences, and the shares of images never first."""
        result = measure_normalized(self.embeds, bank)
        differences = paired_bootstrap(result.scores, self.scores)
        figures: dict[str, Any] = {"num_texts": len(bank.texts), "num_images": len(bank.images)}
        for direction in DIRECTIONS:
            value, difference = result.metrics[f"{direction}_r1"].value, differences[f"{direction}_r1"]
            figures |= {
                f"{direction}_cosine": 100 * (value - difference.value),
                f"{direction}_normalized": 100 * value,
                f"{direction}_difference": 100 * difference.value,
                f"{direction}_interval": [100 * difference.low, 100 * difference.high],
            }
        shares = {"cosine": self.never_first, "normalized": result.never_first}
        return figures | {f"never_first_{name}": 100 * share for name, share in shares.items()}


def draw(train: Embeddings, scale: float, num_texts: int, num_images: int, seed: int) -> Bank:
    """Draw a bank of so many captions and images, or of all where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    texts, images = (
        vectors[torch.randperm(len(vectors), generator=generator)[:number]].half()
        for vectors, number in ((train.texts, num_texts), (train.images, num_images))
    )
    return Bank(texts, images, scale)


def average(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Average figures over models and draws; an interval is averaged end by end."""
    means: dict[str, Any] = {"num_measured": len(rows)}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, list):
            means[name] = [round(statistics.fmean(ends), 2) for ends in zip(*values, strict=True)]
        else:
            means[name] = round(statistics.fmean(values), 2)
            if name.endswith("_difference"):
                means[f"{name}_range"] = [round(min(values), 2), round(max(values), 2)]
    return means


def print_row(row: dict[str, Any]) -> None:
    """Print one line of a Markdown table."""
    cells = [row["ranked"], f"{row['num_texts']:,.0f}", f"{row['num_images']:,.0f}"]
    for direction in DIRECTIONS:
        low, high = row[f"{direction}_interval"]
        cosine, normalized, gain = (row[f"{direction}_{name}"] for name in ("cosine", "normalized", "difference"))
        cells += [f"{cosine:.1f}", f"{normalized:.1f}", f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"]
    cells += [f"{row['never_first_cosine']:.1f}", f"{row['never_first_normalized']:.1f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def main(
    models: Annotated[list[str], typer.Argument(help="Clipmini models of one recipe, such as one for each seed.")],
    source: Annotated[str, typer.Option(help="The data of their training.")],
    split: Annotated[str, typer.Option(help="The split to rank.")] = "validation",
    gallery: Annotated[list[str], typer.Option(help="Other images with captions to rank.")] = [],  # noqa: B006
    draws: Annotated[int, typer.Option(min=1, help="Banks of each size.")] = 5,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep vectors in.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure banks of several sizes, and print a table."""
    encoders = [load_encoder(model) for model in models]
    trains = [embed_split(encoder, source, "train", cache) for encoder in encoders]
    splits = {f"{split} split": (source, split), **{Path(other).name: (other, None) for other in gallery}}
    num_texts, num_images = len(trains[0].texts), len(trains[0].images)
    chosen = min(NUM_BANK_TEXTS, num_texts), min(NUM_BANK_IMAGES, num_images)
    sizes = [(min(number, num_texts), chosen[1]) for number in TEXT_SIZES]
    sizes += [(chosen[0], min(number, num_images)) for number in IMAGE_SIZES]
    if not as_json:
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, place in splits.items():
        ranked = [Ranked(embed_split(encoder, *place, cache)) for encoder in encoders]
        for texts, images in dict.fromkeys(sizes):
            rows = [
                one.compare(draw(train, float(encoder.logit_scale or 0), texts, images, seed))
                for encoder, train, one in zip(encoders, trains, ranked, strict=True)
                for seed in range(draws)
            ]
            row = {"ranked": name, "num_models": len(models), **average(rows)}
            if as_json:
                print(json.dumps(row), flush=True)
            else:
                print_row(row)


if __name__ == "__main__":
    typer.run(main)
