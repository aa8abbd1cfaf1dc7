"""Export a model as two ONNX graphs, and measure what they gain and cost before anything is kept."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from clipmini.conversion import resolve_model
from clipmini.data.images import Skipped
from clipmini.data.pairs import choose_split
from clipmini.evaluation.measure import Embeddings, embed_pairs
from clipmini.evaluation.naming import METRIC_LABELS
from clipmini.evaluation.report import load_pairs
from clipmini.evaluation.request import Request
from clipmini.evaluation.results import Table
from clipmini.evaluation.retrieval import summarize_scores
from clipmini.files import WEIGHTS_FILE, RunRecord, atomic_write, file_sha256, run_of, weights_sha256
from clipmini.inference.embed import DualEncoder, load_model
from clipmini.inference.onnx_model import INPUTS, OUTPUTS, PREPARATION, QUANTIZED, TEXT_GRAPH, VISION_GRAPH, OnnxModel
from clipmini.names import ONNX_FOLDER, ONNX_INT8, check_utf8, first_sentence, public_name
from clipmini.trust import fetch, read_json
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.encoding_clipmini import embed_in_batches
from modeling_clipmini.images_clipmini import read_named
from modeling_clipmini.modeling_clipmini import normalize

from .checks import EXPORT_FILE

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-5  # of any number in a vector of length 1
MIN_IMAGES = 500  # with fewer, a point of recall is a handful of images
MAX_LOST = 0.01
SAMPLE = "offline:photos/test"  # to compare vectors on, where no pairs are given
MAX_CALIBRATION = 200
NUM_ROUNDS = 15
RECALLS = ("text_to_image_r1", "image_to_text_r1")
KINDS = {VISION_GRAPH: "images", TEXT_GRAPH: "texts"}  # what each half embeds


@dataclass(frozen=True, repr=False)
class Exported:
    """A finished export.

    Attributes:
        folder: where the graphs are.
        results: content of `export.json`. `graphs` has, of each graph, its `file`, `sha256` and `num_bytes`; the
            shortest time of one image or caption in the original and in the graph, `torch_ms` and `onnx_ms`; and the
            smallest and the mean cosine of its vectors with the original's. `retrieval` has, by engine, R@1 in both
            directions, in [0, 1]; it is empty with too few images to tell. `source`, `num_images` and `num_captions`
            say which pairs were compared, and `weights_sha256` which weights were exported.
    """

    folder: Path
    results: dict[str, Any]

    def __repr__(self) -> str:
        return f"<{len(self.results['graphs'])} graphs in {self.folder}>"

    @property
    def tables(self) -> list[Table]:
        """The graphs, and the recall of each engine in percent."""
        facts = self.results
        about = f"{facts['source']}: {facts['num_images']:,} images, {facts['num_captions']:,} captions"
        note = f"Times are of one image or caption. Cosines are with torch's vectors, on {about}."
        columns = ["graph", "MB", "ms in torch", "ms in ONNX Runtime", "smallest cosine", "mean cosine"]
        rows = [
            [
                graph["file"],
                f"{graph['num_bytes'] / 1e6:.1f}",
                *(f"{graph[key]:.1f}" for key in ("torch_ms", "onnx_ms")),
                *(f"{graph[key]:.6f}" for key in ("min_cosine", "mean_cosine")),
            ]
            for graph in facts["graphs"]
        ]
        tables = [Table("Graphs", columns, rows, note)]
        if not facts["retrieval"]:
            note = f"It takes {MIN_IMAGES} images with captions (--pairs), and {facts['source']} has "
            return [*tables, Table("Recall lost: could not tell", [], [], f"{note}{facts['num_images']}.")]
        rows = [[name, *(f"{100 * found[key]:.2f}" for key in RECALLS)] for name, found in facts["retrieval"].items()]
        return [*tables, Table(f"R@1 in percent on {about}", ["engine", "text to image", "image to text"], rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return the results and the folder, ready for JSON."""
        return {**self.results, "folder": str(self.folder)}

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)


class _Half(nn.Module):
    """A half of a model, by its method that embeds, with rows of length 1."""

    def __init__(self, model: ClipMiniModel, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return normalize(getattr(self.model, self.method)(*inputs, return_dict=True).pooler_output)


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    int8: bool = False,
    pairs: str | Path | None = None,
    split: str | None = None,
    calibration: Sequence[Path] | None = None,
    force: bool = False,
) -> Exported:
    """Export a model, as `clipmini.export` says, whose arguments are these; `calibration` lists images."""
    if calibration is not None and not int8:
        raise ValueError("--calibration is for graphs of 8 bits: add --int8.")
    location, name = resolve_model(model), public_name(str(model))
    check_utf8(str(out or location))
    if out is None and not Path(location).is_dir():
        raise ValueError(f"{model} is on the Hub: name a folder for its graphs with --out.")
    folder = fetch(location, [*PREPARATION, WEIGHTS_FILE])
    target, within = (folder / ONNX_FOLDER, "") if out is None else (Path(out).expanduser().resolve(), ONNX_FOLDER)
    if out is not None and target.resolve() == (folder / ONNX_FOLDER).resolve():
        raise ValueError(f"{out} is where the graphs of {model} go without --out; leave it out.")
    _check_target(target, target / within / EXPORT_FILE)
    source, splits = load_pairs(Request(folder, str(pairs or SAMPLE), split=split).pairs, Skipped())
    rows = splits[choose_split(splits, split, source)]
    original, digest = load_model(folder, "cpu"), weights_sha256(folder)
    if digest is None:
        raise ValueError(f"{folder} has its weights in several files; save it again as one model.safetensors.")
    with atomic_write(target) as temporary:
        graphs = temporary / within
        graphs.mkdir(parents=True)
        facts = {"weights_sha256": digest, "logit_scale": repr(original.get_logit_scale().item())}
        for graph in INPUTS:
            _write_graph(original, graph, graphs, facts, name)
        exported = OnnxModel(graphs, original.config, original.processor)
        engines = {"torch": DualEncoder(original), "onnx": DualEncoder(exported)}
        embeds = {engine: embed_pairs(encoder, rows) for engine, encoder in engines.items()}
        _check_parity(embeds, name)
        if int8:
            _quantize(graphs, original, calibration)
            engines[ONNX_INT8] = DualEncoder(OnnxModel(graphs, original.config, original.processor, is_quantized=True))
            embeds[ONNX_INT8] = embed_pairs(engines[ONNX_INT8], rows)
        results: dict[str, Any] = {
            "graphs": [_compare(file, engines, embeds) for file in sorted(graphs.glob("*.onnx"))],
            "source": public_name(source),
            "num_images": len(rows),
            "num_captions": len(embeds["torch"].captions),
            "retrieval": {engine: _recalls(found) for engine, found in embeds.items() if len(rows) >= MIN_IMAGES},
            "weights_sha256": digest,
        }
        if not force:
            _check_recall(results)
        for file in (file for pattern in PREPARATION for file in folder.glob(pattern) if out is not None):
            shutil.copy(file, temporary)
        results["files"] = [*_list_files(temporary), Path(within, EXPORT_FILE).as_posix()]
        (graphs / EXPORT_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if out is None and (run := run_of(folder)):  # which may replace them with the model
            RunRecord(run).add((target / file).absolute() for file in results["files"])
    return Exported(target / within, results)


def _list_files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def _check_target(target: Path, report: Path) -> None:
    """Check that a folder does not exist, or is empty, or holds nothing but an earlier export with its report."""
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder.")
    facts = read_json(report)
    written = facts.get("files") if isinstance(facts, dict) else None
    written = written if isinstance(written, list) else []
    if others := [file for file in _list_files(target) if file not in written]:
        raise ValueError(f"{target} holds {others[0]}, which no export wrote: remove it, or name another --out.")


def _write_graph(model: ClipMiniModel, graph: str, folder: Path, facts: Mapping[str, str], name: str) -> None:
    """Trace a half of a model, and write its graph, which says what weights it is of."""
    half, method, shape = "image", "get_image_features", {0: Dim("batch")}
    if graph == TEXT_GRAPH:
        longest = model.config.max_text_tokens
        half, method, shape = "text", "get_text_features", {0: Dim("batch"), 1: Dim("length", max=longest)}
    prepared = model.processor(images=[Image.new("RGB", (64, 64))] * 2, text=["a", "a dog in the rain"])
    inputs = tuple(prepared[key] for key in INPUTS[graph])
    try:
        with _quietly():
            program: Any = torch.onnx.export(
                _Half(model, method).eval(),
                inputs,
                dynamo=True,
                input_names=INPUTS[graph],
                output_names=[OUTPUTS[graph]],
                dynamic_shapes=((shape,) * len(inputs),),
                verbose=False,
            )
    except Exception as error:  # of torch, of onnxscript or of the tower's own code, with pages around the reason
        reason = first_sentence(cause if isinstance(cause := error.__cause__, Exception) else error)
        raise ValueError(f"The {half} half of {name} cannot be exported: {reason}.") from error
    program.model.metadata_props.update(facts)
    program.save(folder / f"{graph}.onnx")


def _check_parity(embeds: Mapping[str, Embeddings], name: str) -> None:
    for graph, kind in KINDS.items():
        difference = (getattr(embeds["torch"], kind) - getattr(embeds["onnx"], kind)).abs().max()
        if not difference <= MAX_DIFFERENCE:  # also where it is NaN
            raise ValueError(
                f"{name} cannot be exported: vectors of its {graph}.onnx differ from torch's by {difference:.1e}, and "
                f"{MAX_DIFFERENCE:.0e} is allowed."
            )


class _Images(CalibrationDataReader):
    """Prepares images one at a time, evenly drawn from all that there are."""

    def __init__(self, files: Sequence[Path], model: ClipMiniModel) -> None:
        images = (read_named(file, str(file)) for file in files[:: -(-len(files) // MAX_CALIBRATION)])
        self._prepared = (model.processor(images=[image])["pixel_values"].numpy() for image in images)

    def get_next(self) -> dict[str, Any] | None:
        pixel_values = next(self._prepared, None)
        return None if pixel_values is None else {"pixel_values": pixel_values}


def _quantize(folder: Path, model: ClipMiniModel, images: Sequence[Path] | None) -> None:
    """Write the text graph with weights of 8 bits, and with activations that are rounded as they come.

    With images, also write the image graph with weights and activations of 8 bits, whose ranges are those of the
    images. All kinds of its nodes are quantized: with convolutions alone, their outputs are rounded before ReLU6 cuts
    them, and the demo model has cosine 0.89 instead of 0.99. Percentiles in place of the extremes gain 0.001, but hold
    the activations of all images.
    """
    with _quietly():  # a scale for each channel: on the demo model cosine 0.993, and with one for all 0.960
        quantize_dynamic(folder / f"{TEXT_GRAPH}.onnx", folder / f"{TEXT_GRAPH}{QUANTIZED}.onnx", per_channel=True)
    if images is None:
        logger.warning("The image half stays in float32: for int8 it needs --calibration.")
        return
    prepared = folder / "prepared.onnx"
    with _quietly():
        quant_pre_process(folder / f"{VISION_GRAPH}.onnx", prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            folder / f"{VISION_GRAPH}{QUANTIZED}.onnx",
            _Images(images, model),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    prepared.unlink()


def _compare(file: Path, engines: Mapping[str, DualEncoder], embeds: Mapping[str, Embeddings]) -> dict[str, Any]:
    """Compare a graph with the original."""
    graph = file.stem.removesuffix(QUANTIZED)
    engine, kind = "onnx" if file.stem == graph else ONNX_INT8, KINDS[graph]
    cosines = (getattr(embeds["torch"], kind) * getattr(embeds[engine], kind)).sum(dim=1)
    inputs = {
        "images": engines["torch"].prepare_image(Image.new("RGB", (64, 64))),
        "texts": embeds["torch"].captions[0],
    }
    method = {"images": "embed_pixels", "texts": "embed_captions"}[kind]
    halves = [getattr(engines[name].model, method) for name in ("torch", engine)]
    torch_ms, onnx_ms = _time(*(partial(embed_in_batches, [inputs[kind]], half, 1) for half in halves))
    return {
        "file": file.name,
        "sha256": file_sha256(file),
        "num_bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")),
        "torch_ms": torch_ms,
        "onnx_ms": onnx_ms,
        "min_cosine": cosines.min().item(),
        "mean_cosine": cosines.mean().item(),
    }


def _time(*calls: Callable[[], Any]) -> list[float]:
    """Return the shortest time of each call, in milliseconds; they take turns. Others are of what else runs."""
    rounds = [[timeit(call, number=1) for call in calls] for _ in range(NUM_ROUNDS)]
    return [1000 * min(times) for times in zip(*rounds, strict=True)]


def _recalls(embeds: Embeddings) -> dict[str, float]:
    metrics = summarize_scores(embeds.scores())
    return {name: metrics[name] for name in RECALLS}


def _check_recall(results: Mapping[str, Any]) -> None:
    """Raise an error if an engine loses too much."""
    for engine, recalls in results["retrieval"].items():
        for name in RECALLS:
            lost = results["retrieval"]["torch"][name] - recalls[name]
            if lost > MAX_LOST:
                raise ValueError(
                    f"{engine} loses {100 * lost:.1f} points of {METRIC_LABELS[name]} on {results['source']}, and 1 "
                    "is allowed, so nothing is kept. Leave out --int8 or --calibration, calibrate with images more "
                    "like these, or pass --force."
                )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what the libraries say of their own affairs, such as types that they do not fuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
