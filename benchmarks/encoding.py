"""What folding BatchNorm and decoding JPEGs at a fraction of their size gain, and what they change.

    python benchmarks/encoding.py MODEL                    # such as runs/demo/model
    python benchmarks/encoding.py MODEL --source FLICKR8K  # its parquet files: recall with both ways to decode, too

Times are CPU time on one thread, measured by turns; medians, in brackets the smallest and the largest ratio of a turn.
Large JPEGs are the photographs of `examples/photos`, enlarged and with grain. So are the images that recall is
measured on, to 1600x1200, since those of Flickr8k are too small to be decoded at a fraction.
"""

import copy
import io
import statistics
from collections.abc import Callable
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from clipmini.data.images import find_images
from clipmini.data.pairs import PairDataset, load_pairs
from clipmini.evaluation.retrieval import retrieval_metrics
from clipmini.inference.embed import DualEncoder
from clipmini.inference.encoders import load_encoder
from measuring import PHOTOS, cpu_ms
from modeling_clipmini.encoding_clipmini import channels_last
from modeling_clipmini.folding_clipmini import FoldedPair

ROUNDS, BATCH = 7, 16
SIZES = ((500, 375), (1600, 1200), (4000, 3000))


def compare(before: Callable[[], Any], after: Callable[[], Any], count: int) -> str:
    """Time two ways by turns: a row's cells, in milliseconds for each of `count`."""
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        turn = [cpu_ms(work) / count for work in (before, after)]
        times.append((turn[0], turn[1]))
    first, second = zip(*times[1:], strict=True)
    ratios = sorted(b / a for a, b in times[1:])
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"{statistics.median(first):.1f} | {statistics.median(second):.1f} | {ratio}"


def unfolded(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do something with every BatchNorm computed by itself."""

    def run() -> Any:
        with patch.object(FoldedPair, "is_folded", lambda self, layer: False):
            return work()

    return run


def gradients(model: Any, pixels: Tensor) -> list[Tensor]:
    """Return the gradients of the vision tower's weights."""
    model.zero_grad()
    pooled = model.pool_images(pixels)
    (pooled * torch.linspace(-1, 1, pooled.shape[1], dtype=pooled.dtype)).sum().backward()
    return [weight.grad.clone() for weight in model.vision_model.parameters() if weight.grad is not None]


def time_folding(model: Any) -> None:
    """Compare the vision tower with and without folding: in use, and in training with frozen statistics."""
    size = model.processor.image_processor.crop_size
    pixels = channels_last(torch.rand(BATCH, 3, size["height"], size["width"]))
    print("| vision tower, batch 16 | two layers, ms an image | folded | ratio |\n|---|---|---|---|")
    tower = torch.no_grad()(lambda: model.pool_images(pixels))
    print(f"| forward | {compare(unfolded(tower), tower, BATCH)} |")
    step = lambda: gradients(model, pixels)  # noqa: E731
    print(f"| forward and backward | {compare(unfolded(step), step, BATCH)} |\n")
    for dtype in (torch.float32, torch.float64):
        exact, few = copy.deepcopy(model).to(dtype), pixels[:4].to(dtype)
        both = unfolded(lambda exact=exact, few=few: gradients(exact, few))(), gradients(exact, few)
        worst = max(((b - a).norm() / a.norm()).item() for a, b in zip(*both, strict=True) if a.norm())
        print(f"Largest relative difference of a weight's gradient in {str(dtype)[6:]}: {worst:.0e}.")


def enlarge(image: Image.Image, size: tuple[int, int], seed: int) -> bytes:
    """Make a large JPEG with grain."""
    large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(seed).normal(0, 4, (*large.shape[:2], 1))
    stream = io.BytesIO()
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def time_decoding(encoder: DualEncoder) -> None:
    """Compare decoding JPEGs whole with decoding them down to `min_edge`."""
    fraction = encoder.min_edge
    print("\n| JPEG, read and prepared | whole, ms | fraction | ratio | smallest cosine | mean |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        files = [enlarge(Image.open(path), size, seed) for seed, path in enumerate(find_images(PHOTOS)[:8])]

        def prepare(min_edge: int | None, files: list[bytes] = files) -> Tensor:
            encoder.min_edge = min_edge
            return torch.cat([encoder.prepare(file) for file in files])

        row = compare(lambda prepare=prepare: prepare(None), lambda prepare=prepare: prepare(fraction), len(files))
        encoder.min_edge = None
        whole = encoder.encode_images(files)
        encoder.min_edge = fraction
        cosines = (whole * encoder.encode_images(files)).sum(dim=1)
        print(f"| {size[0]}x{size[1]} | {row} | {cosines.min():.5f} | {cosines.mean():.5f} |")


def measure_recall(encoder: DualEncoder, source: str) -> None:
    """Measure retrieval on enlarged images of a validation split, decoded both ways."""
    pairs = PairDataset(load_pairs(source)["validation"])
    files = [
        enlarge(Image.open(io.BytesIO(row["image"]["bytes"])), SIZES[1], seed) for seed, row in enumerate(pairs.rows)
    ]
    ids = torch.arange(len(files)).repeat_interleave(torch.tensor(pairs.num_captions))
    fraction, texts = encoder.min_edge, encoder.encode_texts(pairs.captions)
    print("\n| validation, 1600x1200 | R@1 text to image | R@1 image to text | mean recall |\n|---|---|---|---|")
    for name, encoder.min_edge in (("whole", None), ("fraction", fraction)):
        found = retrieval_metrics(encoder.encode_images(files), texts, ids)
        row = (f"{100 * found[key]:.1f}" for key in ("text_to_image_r1", "image_to_text_r1", "mean_recall"))
        print(f"| {name} | {' | '.join(row)} |")


def main(
    model: Annotated[str, typer.Argument(help="The folder of a clipmini model.")],
    source: Annotated[str | None, typer.Option(help="Pairs with a validation split, to measure recall on.")] = None,
) -> None:
    """Measure everything."""
    torch.set_num_threads(1)
    encoder = load_encoder(model)
    time_folding(encoder.model)
    time_decoding(encoder)
    if source is not None:
        measure_recall(encoder, source)


if __name__ == "__main__":
    typer.run(main)
