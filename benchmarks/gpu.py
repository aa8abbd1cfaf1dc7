"""clipmini on one GPU: is it right, how fast is a step beside its bare towers and open_clip, what do images cost?

    python benchmarks/gpu.py               # under 8 minutes on an H100, without a network
    python benchmarks/gpu.py --small       # the same lines on a CPU, with tiny towers, to see that they run
    python benchmarks/gpu.py --json FILE   # keeps the figures too

Prints Markdown tables. A step is forward, loss, backward and AdamW (fused) of ResNet-50 and DistilBERT, with random
weights, on pixels and 24 tokens that are on the GPU; the median is shown. The statistics of BatchNorm are frozen in
clipmini, as by default, and in the bare towers, and move in open_clip, as by its default. open_clip's tokenizer pads
to 77 tokens, so it is measured with 24 and with 77; its step is its own `train_one_epoch`, its gradient cache
`accum_freq`.

Model-FLOP utilization (MFU) is what forward and backward of the bare towers compute, as `torch.utils.flop_counter`
counts it, divided by the time and by what the card does in bf16 by its data sheet. What the gradient cache computes
again, or padding adds, does not count. A step that does not fit in memory says so. When the time is nearly over, what
is left is skipped and says so; the most important come first.
"""

import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, DistilBertConfig, TimmWrapperConfig

from clipmini.inference.embed import DualEncoder
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import character_tokenizer
from clipmini.training.features import prepare_features
from clipmini.training.gradient_cache import cached_backward
from clipmini.training.trainer import ClipMiniTrainer
from measuring import GIB, make_files, versions, wall_s
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import channels_last
from modeling_clipmini.loss_clipmini import infonce_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TOKENS, OPEN_CLIP_TOKENS, WIDTH = 24, 77, 256
# bf16, dense, in FLOP/s, by the data sheets; the first name that the card's contains
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
CLIPMINI, BARE, OPEN_CLIP = "clipmini", "bare towers", "open_clip"
TEXT: dict[bool, dict[str, Any]] = {False: {}, True: {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128}}
Batch = dict[str, Tensor]


@dataclass
class Report:
    """The tables, printed while they are measured, and the time that is left."""

    deadline_s: float
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, table: str, **cells: Any) -> None:
        """Print a row; the first of a table prints the names of its columns."""
        if table not in self.tables:
            names = [name.replace("_", " ") for name in cells]
            print(f"\n{table}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        self.tables.setdefault(table, []).append(cells)
        print(f"| {' | '.join('' if value is None else str(value) for value in cells.values())} |", flush=True)

    @property
    def is_late(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() > self.deadline_s


def set_tf32(is_allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 in products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def architecture(small: bool) -> str:
    """Name the vision tower."""
    return "test_resnet" if small else "resnet50"


def make_model(small: bool) -> ClipMiniModel:
    """Build ResNet-50 with DistilBERT, or something tiny, with random weights."""
    config = ClipMiniConfig(
        vision_config=TimmWrapperConfig(architecture=architecture(small)),
        text_config=DistilBertConfig(**TEXT[small]),
        projection_dim=WIDTH,
        projection="linear",
    )
    torch.manual_seed(0)
    model = ClipMiniModel(config).eval()
    model.processor = ClipMiniProcessor.from_towers(config, character_tokenizer())
    return model


def make_batch(size: int, num_tokens: int = NUM_TOKENS) -> Batch:
    """Draw pixels and tokens on the device; captions of more than 24 tokens are padded."""
    ids = torch.randint(1000, 20_000, (size, num_tokens), device=DEVICE)
    ids[:, NUM_TOKENS:] = 0
    pixels = torch.empty(size, 3, 224, 224, device=DEVICE, memory_format=torch.channels_last).uniform_()
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids > 0).long()}


@torch.no_grad()
def check(report: Report, model: ClipMiniModel) -> None:
    """Compare embeddings of the GPU with those of the CPU."""
    there = make_batch(8)
    expected = model(**{name: rows.cpu() for name, rows in there.items()})
    on_gpu = copy.deepcopy(model).to(DEVICE)
    set_tf32(False)
    exact = on_gpu(**there)
    set_tf32(True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rough = on_gpu(**there)
    table = "Embeddings beside the CPU's in float32"
    for kind in ("image_embeds", "text_embeds"):
        rows = getattr(expected, kind)
        report.add(
            table,
            of="images" if kind == "image_embeds" else "captions",
            largest_difference_in_float32=f"{(rows - getattr(exact, kind).cpu()).abs().max():.1e}",
            smallest_cosine_in_bf16=f"{(rows * getattr(rough, kind).cpu().float()).sum(1).min():.5f}",
        )


class BareTowers(nn.Module):
    """The same towers and projections, and no library around them."""

    def __init__(self, model: ClipMiniModel) -> None:
        super().__init__()
        self.vision, self.text = model.vision_model.timm_model, model.text_model
        self.image_projection, self.text_projection = model.visual_projection, model.text_projection
        self.logit_scale = model.logit_scale

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the loss."""
        image = F.normalize(self.image_projection(self.vision(pixel_values)).float(), dim=-1)
        hidden = self.text(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        text = F.normalize(self.text_projection((hidden * mask).sum(1) / mask.sum(1)).float(), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that all have."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def clipmini_step(model: ClipMiniModel, batch: Batch, is_bf16: bool, is_compiled: bool, chunk: int | None) -> Callable:
    """Make a step of clipmini, as ClipMiniTrainer takes it."""
    optimizer = adamw(model)
    run = torch.compile(model) if is_compiled else model

    def embed(rows: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_bf16):
            output = run(**rows, return_loss=False, return_logits=False)
        return output.image_embeds, output.text_embeds

    def loss_of(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return infonce_loss(image, text, scale)

    def step() -> None:
        scale = model.get_logit_scale()
        if chunk is None:
            loss_of(*embed(batch), scale).backward()
        else:
            leaf = scale.detach().requires_grad_()
            cached_backward(
                embed, lambda image, text: loss_of(image, text, leaf), batch, chunk, last=lambda: scale * leaf.grad
            )
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_step(model: ClipMiniModel, batch: Batch, is_bf16: bool, is_compiled: bool) -> Callable:
    """Make a step of the bare towers."""
    bare = BareTowers(model)
    optimizer = adamw(bare)
    run = torch.compile(bare) if is_compiled else bare

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_bf16):
            loss = run(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def open_clip_step(small: bool, batch: Batch, is_compiled: bool, chunk: int | None, folder: Path) -> Callable:
    """Make a step of open_clip: its `train_one_epoch` over one batch, which is on the device."""
    import open_clip
    from open_clip_train import params
    from open_clip_train.train import train_one_epoch

    distil = DistilBertConfig(**TEXT[small])  # which it does not take; this BERT has the same layers
    BertConfig(
        vocab_size=distil.vocab_size,
        hidden_size=distil.dim,
        num_hidden_layers=distil.n_layers,
        num_attention_heads=distil.n_heads,
        intermediate_size=distil.hidden_dim,
    ).save_pretrained(folder / "bert")
    vision = {"timm_model_name": architecture(small), "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    text = {"hf_model_name": str(folder / "bert"), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    text["hf_model_pretrained"] = False  # type: ignore[assignment]
    model: Any = open_clip.CustomTextCLIP(WIDTH, vision, text, output_dict=True).to(DEVICE)
    size = len(batch["input_ids"])
    frequency = size // (chunk or size)
    options = f"--batch-size {size // frequency} --accum-freq {frequency} --precision amp_bf16 --local-loss"
    args = params.parse_args(options.split())
    vars(args).update(device=DEVICE.type, rank=0, world_size=1, distributed=False, distill=False, wandb=False)
    args.skip_scheduler, args.log_every_n_steps = True, 1000
    loss, optimizer = open_clip.create_loss(args), adamw(model)
    run = torch.compile(model) if is_compiled else model
    run_model = SimpleUnwrapped(run, model) if is_compiled else model
    parts = list(zip(batch["pixel_values"].chunk(frequency), batch["input_ids"].chunk(frequency), strict=True))

    class Loader(list):
        num_batches, num_samples = frequency, size

    data = {"train": SimpleNamespace(dataloader=Loader(parts), set_epoch=lambda epoch: None)}
    return lambda: train_one_epoch(run_model, data, loss, 0, optimizer, None, None, None, args)


class SimpleUnwrapped(nn.Module):
    """A compiled model whose `module` is the original, where open_clip looks for the logit scale."""

    def __init__(self, compiled: Any, module: nn.Module) -> None:
        super().__init__()
        self.compiled, self.module = compiled, module

    def forward(self, *args: Any) -> Any:
        """Run the compiled model."""
        return self.compiled(*args)


@dataclass(frozen=True)
class Line:
    """A row of the table of steps."""

    name: str
    size: str = "small"
    is_bf16: bool = True
    is_compiled: bool = False
    is_cached: bool = False
    num_tokens: int = NUM_TOKENS


# In the order of importance: compiling takes a minute each, and the time may end.
LINES = (
    *(Line(name) for name in (CLIPMINI, BARE, OPEN_CLIP)),
    Line(OPEN_CLIP, num_tokens=OPEN_CLIP_TOKENS),
    *(Line(name, is_bf16=False) for name in (CLIPMINI, BARE)),
    Line(CLIPMINI, is_cached=True),
    *(Line(name, "large", is_cached=True) for name in (CLIPMINI, OPEN_CLIP)),
    *(Line(name, "large") for name in (CLIPMINI, BARE, OPEN_CLIP)),
    *(Line(name, is_compiled=True) for name in (CLIPMINI, BARE, OPEN_CLIP)),
    Line(CLIPMINI, "large", is_compiled=True, is_cached=True),
)


def flops_per_pair(model: ClipMiniModel) -> float:
    """Count what forward and backward of the bare towers compute for a pair."""
    size = 4
    bare = BareTowers(copy.deepcopy(model)).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        bare(**make_batch(size)).backward()
    return counter.get_total_flops() / size


def time_steps(report: Report, small: bool, rounds: int) -> None:
    """Time steps of clipmini, its bare towers and open_clip, in every way."""
    sizes = {"small": 4, "large": 8} if small else {"small": 256, "large": 4096}
    chunk = 2 if small else 256
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    flops = flops_per_pair(make_model(small))
    table = f"Steps, {flops / 1e9:.1f} GFLOP a pair"
    for line in LINES:
        size = sizes[line.size]
        # at the smaller size the cache's chunk is half of the batch, or it would do nothing
        rows = None if not line.is_cached else min(chunk, size // 2)
        cells: dict[str, Any] = {
            "step of": line.name + (f", {line.num_tokens} tokens" if line.num_tokens != NUM_TOKENS else ""),
            "batch": f"{size:,}",
            "precision": "bf16" if line.is_bf16 else "tf32",
            "compiled": "yes" if line.is_compiled else "no",
            "gradient cache": "no" if rows is None else f"chunks of {rows}",
        }
        found: dict[str, Any] = dict.fromkeys(("ms", "pairs per second", "peak GiB", "MFU"))
        try:
            if report.is_late:
                found["ms"] = "no time left"
            else:
                step_s, peak_bytes = _time_line(line, small, size, rows, rounds)
                used = flops * size / step_s / peak if peak and line.is_bf16 else None
                found = {
                    "ms": f"{1000 * step_s:.1f}",
                    "pairs per second": f"{size / step_s:,.0f}",
                    "peak GiB": None if peak_bytes is None else f"{peak_bytes / GIB:.1f}",
                    "MFU": None if used is None else f"{100 * used:.0f} %",
                }
        except torch.OutOfMemoryError:
            found["ms"] = "does not fit"
        report.add(table, **cells, **found)


def _time_line(line: Line, small: bool, size: int, chunk: int | None, rounds: int) -> tuple[float, int | None]:
    """Return the seconds of a step, and the largest memory on the GPU."""
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batch = make_batch(size, line.num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        if line.name == OPEN_CLIP:
            step = open_clip_step(small, batch, line.is_compiled, chunk, Path(folder))
        else:
            model = make_model(small).to(DEVICE)
            model.freeze_batch_norm()
            model.train()
            if line.name == CLIPMINI:
                step = clipmini_step(model, batch, line.is_bf16, line.is_compiled, chunk)
            else:
                step = bare_step(model, batch, line.is_bf16, line.is_compiled)
        num_rounds = max(3, rounds * 256 // size) if not small else rounds
        times = [wall_s(step) for _ in range(2 + num_rounds)][2:]
    return statistics.median(times), torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def time_training(report: Report, small: bool, pairs: Dataset, folder: Path) -> None:
    """Time ClipMiniTrainer from files, with several numbers of data workers."""
    size = 4 if small else 256
    steps = 5 if small else 15
    for num_workers in sorted({2 if small else 4, min(14, os.cpu_count() or 1)}):
        args = ClipMiniTrainingArguments(
            str(folder / "run"),
            per_device_train_batch_size=size,
            dataloader_num_workers=num_workers,
            max_steps=steps,
            logging_steps=1,
            bf16=DEVICE.type == "cuda",
            use_cpu=DEVICE.type == "cpu",
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = make_model(small)
        trainer = ClipMiniTrainer(model, args, pairs)
        trainer.train()
        rates = [entry["pairs_per_second"] for entry in trainer.state.log_history if "pairs_per_second" in entry]
        report.add(
            f"Training from files, batch {size}",
            data_workers=num_workers,
            pairs_per_second=f"{statistics.median(rates[1:]):,.0f}",
        )


def time_images(report: Report, model: ClipMiniModel, files: list[Path], pairs: Dataset, folder: Path) -> None:
    """Time what has to open and prepare images: features of a frozen tower, and encoding."""
    table, count = "Images of 500x375", len(files)
    model = model.to(DEVICE).eval()
    pixels = make_batch(256 if DEVICE.type == "cuda" else 8)["pixel_values"]

    def tower(is_bf16: bool) -> float:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_bf16):
            model.pool_images(channels_last(pixels))
            return min(wall_s(lambda: model.pool_images(pixels)) for _ in range(5))

    for is_bf16, name in ((False, "tf32"), (True, "bf16")):
        rate = f"{len(pixels) / tower(is_bf16):,.0f}"
        report.add(table, what=f"the tower alone, {name}, pixels on the device", images_per_second=rate)
    encoders = (("encode_image", model.encode_image), ("encode_files", DualEncoder(model).encode_files))
    for (name, embed), batch_size in itertools.product(encoders, (None, 64)):
        options = {} if batch_size is None else {"batch_size": batch_size}
        took_s = wall_s(lambda embed=embed, options=options: embed(files, **options))  # type: ignore[misc]
        what = f"{name}, {'its own batch size' if batch_size is None else f'batches of {batch_size}'}"
        report.add(table, what=what, images_per_second=f"{count / took_s:,.0f}")
    for num_workers in sorted({0, 4, min(14, os.cpu_count() or 1)}):
        os.environ["CLIPMINI_CACHE"] = str(folder / f"cache{num_workers}")
        args = ClipMiniTrainingArguments(
            str(folder), freeze_vision=True, dataloader_num_workers=num_workers, per_device_eval_batch_size=64
        )
        took_s = wall_s(lambda args=args: prepare_features(model, {"validation": pairs}, args))  # type: ignore[misc]
        what = f"scan and frozen features, {num_workers} data workers"
        report.add(table, what=what, images_per_second=f"{count / took_s:,.0f}")
    took_s = wall_s(lambda: prepare_features(model, {"validation": pairs}, args))
    report.add(table, what="the same again, from the store", images_per_second=f"{count / took_s:,.0f}")


def main(
    small: Annotated[bool, typer.Option(help="Tiny towers, small batches, few images.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    minutes: Annotated[float, typer.Option(help="Time no further line of the steps after this.")] = 7.0,
) -> None:
    """Measure everything."""
    start_s = time.monotonic()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)  # on a busy machine several would wait for each other
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    about = f"{card}, {os.cpu_count()} CPU cores, {versions('torch', 'transformers', 'timm', 'open_clip_torch')}"
    print(about)
    report = Report(start_s + 60 * minutes)
    model = make_model(small)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, captions = make_files(folder / "files", 48 if small else 4000)
        pairs = Dataset.from_list(
            [
                {"image": {"bytes": None, "path": str(file)}, "captions": [caption], "image_id": number}
                for number, (file, caption) in enumerate(zip(files, captions, strict=True))
            ]
        )
        check(report, model)
        time_images(report, model, files, pairs, folder)
        time_training(report, small, pairs, folder)
        time_steps(report, small, 3 if small else 15)
    if json_file:
        json_file.write_text(json.dumps({"about": about, "tables": report.tables}))
    print(f"\n{time.monotonic() - start_s:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
