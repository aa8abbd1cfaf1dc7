"""A page in which a model labels images in the visitor's browser, without a server: a static Space on the Hub."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData, constants

from clipmini.html import render
from clipmini.inference.embed import load_model
from modeling_clipmini.handler import DEFAULT_TEMPLATE

from .checks import EXAMPLES, matches
from .push import CARD, SPACE, SPACE_MARK, PreparedPush

FOLDER = Path(__file__).with_name("space")
GRAPHS = {"image": "onnx/vision_model", "text": "onnx/text_model"}
PROCESSOR = "preprocessor_config.json"
DATA = (PROCESSOR, "tokenizer.json", "tokenizer_config.json", "LICENSE*", "NOTICE*", f"{EXAMPLES}/*")
FILTERS = (2, 3)  # bilinear and bicubic, by Pillow's numbers: those that the page resizes with
ABOUT = """
# {name}

The model [{repo_id}]({url}) in your browser: choose an image, write labels, and see which fits best. Images and labels
do not leave your device. Made by `clipmini push --space`.
"""


def prepare_space(model: PreparedPush, folder: Path) -> PreparedPush:
    """Gather the files of a model's page, ready to push to a Space of the model's name.

    Args:
        model: the push of the model, whose files the page takes along: of each half the quantized graph where there is
            one, since visitors download it, the tokenizer, the license and the examples.
        folder: the model's folder.

    Raises:
        ValueError: the model has not been exported, or the page cannot do what its processor does.
    """
    graphs = {kind: _find_graph(model, name, folder) for kind, name in GRAPHS.items()}
    processor = json.loads(_read(model, PROCESSOR, folder))
    if processor.get("resample") not in FILTERS:
        raise ValueError(
            f"{folder / PROCESSOR} has resample={processor.get('resample')!r}, and the page of --space resizes "
            "only by 2 (bilinear) and 3 (bicubic); push without it."
        )
    _read(model, "tokenizer.json", folder)
    card = ModelCard(_read(model, CARD, folder).decode()).data
    name, url = model.repo_id.split("/")[1], f"{constants.ENDPOINT}/{model.repo_id}"
    settings = {
        "model": model.repo_id,
        "url": url,
        "license": card.get("license_name") or card.get("license"),
        "logit_scale": load_model(folder, device="cpu").get_logit_scale().item(),
        "template": DEFAULT_TEMPLATE,
        "graphs": {kind: {"path": path, "size": model.sizes[path]} for kind, path in graphs.items()},
        "examples": [item for item in card.get("widget", []) if item.get("src") in model.files],
    }
    files: dict[str, Path | bytes] = {
        path: content for path, content in model.files.items() if matches(path, DATA) or path in graphs.values()
    }
    licenses = {key: card.get(key) for key in ("license", "license_name", "license_link") if card.get(key)}
    metadata = SpaceCardData(title=name, sdk="static", models=[model.repo_id], **licenses)
    files[CARD] = f"---\n{metadata}\n---\n{ABOUT.format(name=name, repo_id=model.repo_id, url=url)}".encode()
    files["index.html"] = render((FOLDER / "index.html").read_text("utf-8"), name=name, settings=settings).encode()
    files[SPACE_MARK] = FOLDER / SPACE_MARK
    return PreparedPush(model.repo_id, dict(sorted(files.items())), repo_type=SPACE)


def _find_graph(model: PreparedPush, name: str, folder: Path) -> str:
    path = next((path for path in (f"{name}_quantized.onnx", f"{name}.onnx") if path in model.files), None)
    if path is None:
        raise ValueError(
            f"{folder} has no {name}.onnx to run in browsers: `clipmini export {folder} --to onnx` makes it."
        )
    return path


def _read(model: PreparedPush, name: str, folder: Path) -> bytes:
    content = model.files.get(name)
    if content is None:
        raise ValueError(f"{folder} has no {name}, which the page of --space needs; save the model's processor again.")
    return content if isinstance(content, bytes) else content.read_bytes()
