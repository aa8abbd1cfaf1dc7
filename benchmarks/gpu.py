"""clipmini on one GPU: is it right, how fast is a step beside its bare towers, what does preparing images cost?

    python benchmarks/gpu.py            # a minute on an H100
    python benchmarks/gpu.py --small    # the same on a CPU, to see that it runs

Prints Markdown tables. Steps are timed by turns, and the median of the rounds is shown. Images are random crops of the
photographs in examples/photos, as JPEG files.
"""

import copy
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from datasets import Dataset
from PIL import Image
from transformers import DistilBertConfig, TimmWrapperConfig

from clipmini.data.images import find_images
from clipmini.inference.embed import as_encoder
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import character_tokenizer
from clipmini.training.features import prepare_features
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import channels_last

PHOTOS = Path(__file__).parent.parent / "examples" / "photos"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TOKENS = 24


def set_tf32(is_allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 in products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def seconds(work: Callable[[], Any]) -> float:
    """Time something that may run on the GPU."""
    start_s = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def make_model(small: bool) -> ClipMiniModel:
    """Build ResNet-50 with DistilBERT, or something tiny, with random weights."""
    text = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128} if small else {}
    config = ClipMiniConfig(
        vision_config=TimmWrapperConfig(architecture="test_resnet" if small else "resnet50"),
        text_config=DistilBertConfig(**text),
        projection_dim=256,
    )
    torch.manual_seed(0)
    model = ClipMiniModel(config).eval()
    model.processor = ClipMiniProcessor.from_towers(config, character_tokenizer())
    return model


@torch.no_grad()
def check(model: ClipMiniModel, batch: dict[str, torch.Tensor]) -> None:
    """Compare embeddings of the GPU with those of the CPU."""
    few = {name: rows[:8] for name, rows in batch.items()}
    there = {name: rows.to(DEVICE) for name, rows in few.items()}
    expected = model(**few)
    on_gpu = copy.deepcopy(model).to(DEVICE)
    set_tf32(False)
    exact = on_gpu(**there)
    set_tf32(True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rough = on_gpu(**there)
    print("| embeddings, beside the CPU's in float32 | images | captions |\n|---|---|---|")
    pairs = [(getattr(expected, name), name) for name in ("image_embeds", "text_embeds")]
    differences = [f"{(rows - getattr(exact, name).cpu()).abs().max():.1e}" for rows, name in pairs]
    cosines = [f"{(rows * getattr(rough, name).cpu().float()).sum(1).min():.5f}" for rows, name in pairs]
    print(f"| float32: largest difference | {' | '.join(differences)} |")
    print(f"| bf16: smallest cosine | {' | '.join(cosines)} |\n")


def time_steps(model: ClipMiniModel, batch: dict[str, torch.Tensor], rounds: int) -> None:
    """Time forward and backward of clipmini, and of its bare towers with open_clip's loss."""
    import open_clip

    model = model.to(DEVICE).train()
    batch = {name: rows.to(DEVICE) for name, rows in batch.items()}
    batch["pixel_values"] = channels_last(batch["pixel_values"])
    open_clip_loss = open_clip.ClipLoss()

    def towers() -> tuple[torch.Tensor, torch.Tensor]:
        image = model.visual_projection(model.vision_model.timm_model(batch["pixel_values"]))
        hidden = model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return F.normalize(image.float(), dim=-1), F.normalize(model.text_projection(hidden.mean(1)).float(), dim=-1)

    losses = {
        "clipmini": lambda: model(**batch).loss,
        "bare towers, open_clip's loss": lambda: open_clip_loss(*towers(), model.logit_scale.exp()),
    }
    size = len(batch["input_ids"])
    print(f"| step of {size} pairs | precision | ms | pairs per second |\n|---|---|---|---|")
    for is_bf16, (name, loss) in itertools.product((True, False), losses.items()):
        times = []
        for _ in range(3 + rounds):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_bf16):
                times.append(seconds(lambda loss=loss: loss().backward()))
            model.zero_grad()
        median_s = statistics.median(times[3:])
        print(f"| {name} | {'bf16' if is_bf16 else 'tf32'} | {1000 * median_s:.1f} | {size / median_s:,.0f} |")


def make_files(folder: Path, count: int) -> list[Path]:
    """Write random crops of the photographs."""
    draw, files = random.Random(0), []
    photos = [Image.open(path).convert("RGB") for path in find_images(PHOTOS)]
    for number in range(count):
        photo = draw.choice(photos)
        left, top = (draw.uniform(0, 0.3) * edge for edge in photo.size)
        files.append(folder / f"{number}.jpg")
        photo.crop((int(left), int(top), *photo.size)).resize((320, 240)).save(files[-1], quality=90)
    return files


def time_images(model: ClipMiniModel, count: int, folder: Path) -> None:
    """Time what has to open and prepare images: features of a frozen tower, and `encode_image`."""
    files = make_files(folder, count)
    model = model.to(DEVICE).eval()
    rows = [
        {"image": {"bytes": None, "path": str(file)}, "captions": [file.stem], "image_id": number}
        for number, file in enumerate(files)
    ]
    pairs = Dataset.from_list(rows)
    pixels = channels_last(torch.rand(256, 3, 224, 224, device=DEVICE))
    with torch.no_grad():
        model.pool_images(pixels)
        tower_s = min(seconds(lambda: model.pool_images(pixels)) for _ in range(5))
    print("\n| ResNet-50 in float32 (tf32), files of 320x240 | images per second |\n|---|---|")
    print(f"| the tower alone, pixels on the device | {len(pixels) / tower_s:,.0f} |")
    for num_workers in sorted({0, 4, min(14, os.cpu_count() or 1)}):
        os.environ["CLIPMINI_CACHE"] = str(folder / f"cache{num_workers}")
        args = ClipMiniTrainingArguments(
            str(folder), freeze_vision=True, dataloader_num_workers=num_workers, per_device_eval_batch_size=64
        )
        took_s = seconds(lambda args=args: prepare_features(model, {"validation": pairs}, args))
        print(f"| scan and frozen features, {num_workers} data workers | {count / took_s:,.0f} |")
    took_s = seconds(lambda: prepare_features(model, {"validation": pairs}, args))
    print(f"| the same again, from the store | {count / took_s:,.0f} |")
    for name, embed in (("encode_image", model.encode_image), ("encode_files", as_encoder(model).encode_files)):
        took_s = seconds(lambda embed=embed: embed(files, batch_size=64))
        print(f"| {name} | {count / took_s:,.0f} |")


def main(small: Annotated[bool, typer.Option(help="Tiny towers, few images.")] = False) -> None:
    """Measure everything."""
    size = 8 if small else 256
    print(f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, torch {torch.__version__}\n")
    model = make_model(small)
    ids = torch.randint(1000, 20_000, (size, NUM_TOKENS))
    batch = {"pixel_values": torch.rand(size, 3, 224, 224), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check(model, batch)
    time_steps(model, batch, 3 if small else 20)
    with tempfile.TemporaryDirectory() as folder:
        time_images(model, 64 if small else 4000, Path(folder))


if __name__ == "__main__":
    typer.run(main)
