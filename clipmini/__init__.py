"""Train your own small CLIP, trust its numbers, ship it, and search with it.

The functions here refuse wrong input first, and then import what is slow to import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import device as Device

    from clipmini.evaluation.results import Evaluation, Run
    from clipmini.indexing.index import Index
    from clipmini.inference.onnx_model import OnnxModel
    from clipmini.inference.search import Hits
    from clipmini.inference.zero_shot import Classification
    from clipmini.publishing.export import Exported
    from clipmini.publishing.push import Pushed
    from modeling_clipmini import ClipMiniModel

if find_spec("clipmini.training") is None:  # Python has found the checkout before the installed package
    raise ImportError(
        "This clipmini is the folder of a checkout that is not installed, and lacks clipmini.training: run "
        "`pip install -e .` in the checkout, or start Python elsewhere."
    )

__all__ = [
    "__version__",
    "classify",
    "convert",
    "evaluate",
    "export",
    "interpolate",
    "load",
    "metric",
    "open_index",
    "push",
    "search",
    "train",
]

try:
    __version__ = version("clipmini")
except PackageNotFoundError:  # a copied folder
    __version__ = "unknown"


def __dir__() -> list[str]:
    return __all__


def load(
    name_or_folder: str | Path, device: str | Device | None = None, *, engine: str = "auto"
) -> ClipMiniModel | OnnxModel:
    """Load a model with the code of this package, never with that of its folder.

    Args:
        name_or_folder: a folder that training saved, a Hub id, or another name that `convert` takes.
        device: where to put the model; by default the accelerator that torch finds, such as a CUDA GPU or a Mac's
            (mps), or else the CPU.
        engine: "torch"; or "onnx" or "onnx-int8" for the graphs that `export` wrote, which the CPU computes, with
            `pip install 'clipmini[onnx]'`. Where a half has no int8 graph, "onnx-int8" takes that in float32. "auto"
            is torch.

    Returns:
        The model in eval mode, with its processor as `model.processor`. One of ONNX Runtime embeds, and no more.

    Raises:
        ValueError: this is no clipmini model, or its files are missing, damaged, or name code of their own; the Hub
            cannot be reached; or there is no such device or engine.

    Example:
        >>> model = clipmini.load(folder)
        >>> model.encode_text("a red bicycle").shape
        (16,)
    """
    from clipmini.names import locate_model

    locate_model(name_or_folder, engine)
    from clipmini.inference.encoders import load_clipmini

    return load_clipmini(name_or_folder, device, engine)


def convert(name: str | Path, out: str | Path | None = None) -> ClipMiniModel:
    """Turn a CLIP of another library into a clipmini model that embeds the same.

    Wherever a model is named, such a model can be named as it is, and is converted once, into the cache; this is for
    a folder of its own, to change or to publish.

    Args:
        name: the folder or Hub id of a CLIP or SigLIP of transformers, sentence-transformers or open_clip; or
            `open_clip:NAME/PRETRAINED`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`.
        out: a new folder to save the model in, with its card.

    Returns:
        The model in eval mode, with its processor as `model.processor`.

    Raises:
        ValueError: there is no such model, it has parts that clipmini's models lack, it would run code of its own, or
            the folder exists.

    Example:
        >>> model = clipmini.convert(clip_folder)
        >>> model.encode_text("a red bicycle").shape
        (8,)
    """
    from clipmini.names import check_utf8, locate_model

    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_utf8(str(folder))
    if folder is not None and (folder.is_symlink() or folder.exists()):
        raise ValueError(f"{out} exists: remove it, or name another folder for the converted model.")
    located = locate_model(name)
    from clipmini.conversion import resolve_model
    from clipmini.inference.embed import load_model
    from clipmini.publishing.card import render_converted_card
    from clipmini.publishing.folder import save_model_folder

    converted = resolve_model(located)
    if converted == str(located):
        raise ValueError(f"{name} is a clipmini model already; use it as it is.")
    model = load_model(converted, "cpu")
    if folder is not None:
        card = render_converted_card(folder.absolute().name, model, str(name))
        save_model_folder(model, folder, card, made_of=[str(located)])
    return model


def train(recipe: str | Path, /, *, overwrite: bool = False, stage: str | None = None, **changes: Any) -> Run:
    """Train a model from a recipe, and measure retrieval before and after; resume a run that was interrupted.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with clipmini, such as "demo"; or, with `model` set to
            the folder or Hub id of a model, the data to train it further on, by the recipe "fine-tune".
        overwrite: replace the run in the output folder.
        stage: run only this stage of the recipe.
        **changes: keys of the recipe, as on the command line; `clipmini train --help` lists them. A section may be a
            mapping, `data={"source": "my_images"}`, and a key dotted, `**{"lora.rank": 4}`.

    Returns:
        The run: `folder`, `results`, and `model()`, which loads the trained model.

    Raises:
        ValueError: a key or a value is wrong, data or model cannot be used, or the output folder holds another run.

    Example:
        >>> run = clipmini.train(recipe, source=images, output_dir=folder / "run", num_train_epochs=1)
        >>> sorted(run.results["splits"])
        ['test', 'validation']
        >>> run.model().encode_text("a red bicycle").shape
        (32,)
    """
    from clipmini.recipe_files import check_origin, check_start, read_recipe

    values = read_recipe(str(recipe), changes)
    check_start(values, stage)
    if stage is None:  # one stage alone may start from the model of the one before it
        check_origin(values)
    from clipmini.training.recipes import build_recipe
    from clipmini.training.run import train as run_recipe

    return run_recipe(build_recipe(values), overwrite=overwrite, stage=stage)


def evaluate(
    model: str | Path | ClipMiniModel,
    data: str | Path,
    task: str = "retrieval",
    *,
    split: str | None = None,
    baseline: str | Path | ClipMiniModel | None = None,
    template: str | None = None,
    train_data: str | None = None,
    check_leaks: bool = True,
    engine: str = "auto",
    strict: bool = False,
    **changes: Any,
) -> Evaluation:
    """Measure a model, with confidence intervals; `save` writes the report.

    Args:
        model: a model, its folder or its Hub id; or another name that `convert` takes.
        data: for retrieval, image-caption pairs: a folder, a table, a Hub id, or a recipe with data. For the other
            tasks, labeled images: a folder with one subfolder per class, or a Hub id.
        task: "retrieval", "zero-shot" or "probe".
        split: the split to measure; by default test, else validation, else train.
        baseline: another model to compare with on the same images; not for a probe.
        template: for zero-shot only: the caption of a label, with {} where the label goes; or a list of captions:
            "imagenet", "simple" or a YAML file.
        train_data: for retrieval only: the data that the model was trained on, to look for leaks; by default the train
            split of `data`.
        check_leaks: look for test data among the training data; not for zero-shot.
        engine: what computes the model, as in `load`; a baseline is always torch's.
        strict: raise an error at the first image or caption that cannot be used, instead of leaving it out.
        **changes: keys of a recipe's `data`, such as `caption_column`; for labeled images, `image_column`,
            `label_column`, `config_name` and `class_names`: a file or a mapping from folders to names.

    Returns:
        The evaluation: `results`, `tables` and `page`.

    Raises:
        ValueError: a model, the data, the split or the template cannot be used, or the task has no such option.

    Example:
        >>> evaluation = clipmini.evaluate(folder, images)
        >>> evaluation.results["metrics"]["mean_recall"]["value"] <= 1
        True
    """
    from clipmini.data.images import Skipped
    from clipmini.evaluation.request import Request

    request = Request(model, str(data), task, split, baseline, template, train_data, check_leaks, changes, engine)
    from clipmini.evaluation.report import evaluate as run_evaluation

    return run_evaluation(request, Skipped(strict))


def search(
    model: str | Path | ClipMiniModel,
    images: str | Path | Sequence[str | Path | Image],
    query: str | Image,
    top: int = 9,
    *,
    plus: Sequence[str | Image] = (),
    minus: Sequence[str | Image] = (),
    where: str | None = None,
    collapse: bool = False,
    use_index: bool = True,
    engine: str = "auto",
    strict: bool = False,
) -> Hits:
    """Find the images that best match a description, or are most like an image.

    Args:
        model: as in `evaluate`.
        images: a folder, including its subfolders; or a list of image files and Pillow images.
        query: what the images should show, in words; or an image, as `image:` and its path, or itself.
        top: how many images to find; fewer if there are fewer.
        plus: words or images to add to the query.
        minus: words or images to subtract from it.
        where: a condition in SQL, such as "width > 1000 and date >= '2024-01-01'"; for a folder with an index only.
        collapse: of images that are near-copies of each other, find the best alone.
        use_index: keep the vectors of a folder in the cache, so that the next search embeds only new images; this
            needs lancedb, `pip install 'clipmini[search]'`.
        engine: what computes the model, as in `load`.
        strict: raise an error at the first image that cannot be read, instead of leaving it out.

    Returns:
        A sequence of hits, the best first, each with `image` and `score`: its cosine similarity in [-1, 1]; or, where
        a model that is given by name has a bank, the cosine minus the image's prior, so that no image fits every
        query.

    Raises:
        ValueError: the model, the query or another argument is not allowed, or no image can be read.

    Example:
        >>> hits = clipmini.search(folder, images, "a red bicycle", top=3)
        >>> len(hits), hits[0].score >= hits[2].score
        (3, True)
    """
    options: dict[str, Any] = {"plus": plus, "minus": minus, "where": where, "collapse": collapse, "engine": engine}
    return search_each(model, images, [query], top, **options, use_index=use_index, strict=strict)[0]


def search_each(
    model: str | Path | ClipMiniModel,
    images: str | Path | Sequence[str | Path | Image],
    queries: Sequence[str | Image],
    top: int = 9,
    *,
    strict: bool = False,
    **options: Any,
) -> list[Hits]:
    """Search for each of several queries as `search` does, of which the other arguments are."""
    from clipmini.data.images import Skipped, expand_files, find_images
    from clipmini.inference.prompts import check_queries
    from clipmini.names import locate_model

    check_queries([*queries, *options.get("plus", ()), *options.get("minus", ())], top)
    locate_model(model, options.get("engine", "auto"))
    if isinstance(images, (str, os.PathLike)):
        find_images(images)
    else:
        images = expand_files(images)
    from clipmini.indexing.find import find

    return find(model, images, queries, top, **options, skipped=Skipped(strict))


def open_index(path: str | Path, model: str | Path | None = None, *, engine: str = "auto") -> Index:
    """Open an index of images, which is searched without embedding them again; make one if there is none.

    Args:
        path: the index: a folder, or an address of object storage, such as s3://bucket/photos.
        model: the name of a model, as in `evaluate`: to make a new index with, which records it; or where that of an
            index has moved to.
        engine: what computes the model, as in `load`. "torch" and "onnx" go on with each other's index, since their
            vectors are the same; one of "onnx-int8" is its own.

    Returns:
        The index, with `search`, `add`, `remove` and `to_datasets`. `len` is its number of images.

    Raises:
        ValueError: there is no index and no model to make one, it is damaged or was made with another model, or
            lancedb is not installed.

    Example:
        >>> index = clipmini.open_index(folder / "photos.index", folder)
        >>> index.add(images).num_embedded == len(index)
        True
        >>> hits = index.search("a red bicycle", top=3)[0]
        >>> len(hits)
        3
    """
    from clipmini.names import check_engine, is_index

    check_engine(engine)
    if model is not None and not isinstance(model, (str, Path)):
        raise ValueError(
            f"A loaded {type(model).__name__} is not a name, and an index records its model: give the model's folder "
            "or Hub id."
        )
    try:
        from clipmini.indexing.index import Index
    except ModuleNotFoundError as error:
        raise ValueError(f"An index needs {error.name}: pip install 'clipmini[search]'.") from None
    is_new = model is not None and not is_index(path)
    return Index.create(path, model, engine) if is_new else Index(path, model, engine)


def classify(
    model: str | Path | ClipMiniModel,
    images: str | Path | Image | Sequence[str | Path | Image],
    labels: Sequence[str],
    template: str | Sequence[str] | None = None,
    *,
    engine: str = "auto",
    strict: bool = False,
) -> Classification:
    """Score how well each label fits each image, without training on the labels.

    Args:
        model: as in `evaluate`.
        images: an image file or a Pillow image, or a list of these.
        labels: what the images may show.
        template: the caption of a label, with {} where the label goes, or several, whose embeddings are averaged; or a
            list by name: "imagenet", "simple" or a YAML file. By default "This is a photo of {}.", as in transformers'
            pipeline.
        engine: what computes the model, as in `load`.
        strict: raise an error at the first image that cannot be read, instead of leaving it out.

    Returns:
        A sequence in the order of the images, each with `image`, its best `label`, and `scores`: all labels, the best
        first, with scores that sum to 1.

    Raises:
        ValueError: the model, a label or a template is not allowed, or no image can be read.

    Example:
        >>> answer = clipmini.classify(folder, image, ["a cat", "a dog"])
        >>> answer[0].label in ("a cat", "a dog")
        True
    """
    from clipmini.data.images import Skipped, expand_files
    from clipmini.inference.prompts import fill_template, load_templates
    from clipmini.names import locate_model

    templates = load_templates(template) if isinstance(template, str) else list(template or [])
    for caption in templates or ["{}"]:
        fill_template(labels, caption)  # raises an error if the labels or the template are not allowed
    locate_model(model, engine)
    found = expand_files(images if isinstance(images, Iterable) and not isinstance(images, str) else [images])
    from clipmini.inference.encoders import load_encoder
    from clipmini.inference.zero_shot import Classification
    from clipmini.inference.zero_shot import classify as run_classifier
    from modeling_clipmini.handler import DEFAULT_TEMPLATE

    template, templates = template or DEFAULT_TEMPLATE, templates or [DEFAULT_TEMPLATE]
    skipped = Skipped(strict)
    results = run_classifier(load_encoder(model, engine), found, labels, templates, skipped)
    return Classification(template, results, skipped)


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    int8: bool = False,
    pairs: str | Path | None = None,
    split: str | None = None,
    calibration: str | Path | None = None,
    force: bool = False,
) -> Exported:
    """Export a model's two halves as ONNX graphs, and measure what that gains and costs.

    Args:
        model: a model folder or a Hub id.
        out: a folder for all that the graphs need; by default they go to `onnx/` in the model's own folder. An
            earlier export is replaced.
        int8: also export a smaller and faster text graph, whose weights have 8 bits; and such an image graph, if there
            are images to calibrate it with.
        pairs: image-caption pairs to measure recall on, as in `evaluate`; at least 500 images, or none is told.
        split: of the pairs, as in `evaluate`.
        calibration: a folder of images of the kind that the model will see; a hundred are enough.
        force: keep graphs that lose more than one point of recall at 1.

    Returns:
        The export: `folder`, `results` and `tables`.

    Raises:
        ValueError: this is no clipmini model, it or the data cannot be used, the folder holds other files, or the
            graphs lose too much; then nothing is written.

    Example:
        >>> exported = clipmini.export(folder)
        >>> [graph["file"] for graph in exported.results["graphs"]]
        ['text_model.onnx', 'vision_model.onnx']
        >>> clipmini.load(folder, engine="onnx").encode_text("a red bicycle").shape
        (16,)
    """
    from clipmini.data.images import find_images
    from clipmini.names import check_installed, locate_model

    check_installed("An export", "onnx", "onnxscript")
    locate_model(model)
    images = None if calibration is None else find_images(calibration)
    from clipmini.publishing.export import export as run_export

    return run_export(model, out, int8=int8, pairs=pairs, split=split, calibration=images, force=force)


def interpolate(
    start: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    keep: str | Path | None = None,
) -> Run:
    """Measure the models on the line between two, and save the best that is not surely worse elsewhere (WiSE-FT).

    The weights are (1 - a) START + a TUNED, for a from 0 to 1 in steps of 0.1 (Wortsman et al., 2022,
    arXiv:2109.01903). On validation splits, where there are such, that model is chosen which is best on the new data
    among those that are not surely worse than START on the kept data, by a paired 95 % interval. It is reported on
    test splits.

    Args:
        start: the folder or Hub id of a model.
        tuned: likewise, of a model that was trained from it.
        out: the folder to write, as of a run; by default that of the tuned model's run with "-interpolated" added.
        data: the new data, pairs or labeled images, as in `evaluate`; by default those of the tuned model's run.
        keep: the data on which the model must not get worse, likewise; by default the run's `keep`.

    Returns:
        The chosen model as a run, with the curve in `results["interpolation"]` and in `curves.png`.

    Raises:
        ValueError: the models are not of one architecture, `out` exists, or the data cannot be used, or are neither
            named nor known.

    Example:
        >>> chosen = clipmini.interpolate(folder, folder, folder.parent / "between", data=images, keep=images)
        >>> chosen.results["interpolation"]["weight"]
        0.0
    """
    from clipmini.names import locate, locate_model
    from clipmini.recipe_files import is_recipe

    for model in (start, tuned):
        locate_model(model)
    sources = ["" if source is None else str(source) for source in (data, keep)]
    for source in sources:
        if source and not is_recipe(source):
            locate(source, "a folder, a table or a recipe", "dataset")
    from clipmini.publishing.interpolation import interpolate as run_interpolation

    return run_interpolation(str(start), str(tuned), None if out is None else Path(out), *sources)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    examples: Sequence[tuple[str | Path, Sequence[str]]] = (),
    samples: bool = False,
    space: bool = False,
    allow_code_drift: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Upload a trained model to the Hub in one commit, with its model card and results.

    Args:
        folder: the model folder that training saved.
        repo_id: the repository, owner/name, created if missing.
        private: make the repository private.
        revision: the branch, created if missing; by default `main`.
        message: the commit message.
        examples: images to publish for the Hub's widget, each with labels to choose from.
        samples: also upload the run's `samples.jpg`, which holds images and captions of its data, and show it in the
            card.
        space: also make a static Space of this name: a page that runs the model, exported before, in browsers.
        allow_code_drift: accept a folder whose code differs from the installed clipmini's.
        dry_run: check and list the files, without any network.

    Returns:
        The files, the commit, and the address of the branch.

    Raises:
        ValueError: the folder must not be published as it is, or the Hub refused; the message says what to do.

    Example:
        >>> pushed = clipmini.push(folder, "my-name/my-clip", dry_run=True)
        >>> "model.safetensors" in pushed.sizes
        True
    """
    from clipmini.names import check_repository, locate_model

    check_repository(repo_id)
    locate_model(Path(folder))
    if space and revision:
        raise ValueError("A Space shows its branch main; leave out the revision, or the Space.")
    from clipmini.publishing.push import Pushed, prepare_push
    from clipmini.publishing.push import push as upload
    from clipmini.publishing.space import prepare_space

    images = [(Path(image), labels) for image, labels in examples]
    prepared = prepare_push(Path(folder), repo_id, allow_code_drift=allow_code_drift, examples=images, samples=samples)
    page = prepare_space(prepared, Path(folder)) if space else None
    if dry_run:
        planned = Pushed(repo_id, page.sizes) if page else None
        return Pushed(repo_id, prepared.sizes, left_out=prepared.left_out, bank=prepared.bank, space=planned)
    pushed = upload(prepared, private=private or None, revision=revision, message=message)
    return replace(pushed, space=upload(page, private=private or None, message=message)) if page else pushed


def metric(name: str) -> str:
    """Return the folder of one of clipmini's metrics, for the `evaluate` library.

    Args:
        name: "image_text_retrieval" or "zero_shot_accuracy".

    Returns:
        An absolute path, which `evaluate.load` takes in any working directory.

    Raises:
        ValueError: there is no such metric.

    Example:
        >>> evaluate.load(clipmini.metric("image_text_retrieval")).name
        'image_text_retrieval'
    """
    folder = Path(__file__).parent / "evaluation" / "metrics"
    known = sorted(path.name for path in folder.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; use one of {', '.join(known)}.")
    return str(folder / name)
