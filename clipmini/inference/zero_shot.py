"""Classify images by labels given as words, without training on them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from clipmini.data.images import Skipped
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.loss_clipmini import pairwise_logits
from modeling_clipmini.modeling_clipmini import normalize

from .encode import check_text, encode_files, encode_images, encode_texts

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class LabelScore:
    """A label and the probability that an image shows it rather than one of the other labels."""

    label: str
    score: float


def classify(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    images: Iterable[Any],
    labels: Sequence[str],
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    batch_size: int = 16,
) -> list[list[LabelScore]]:
    """Score labels for images, as transformers' zero-shot image classification pipeline does.

    Args:
        model: in eval mode.
        processor: the model's processor.
        images: anything that `read_image` takes; read one batch at a time.
        labels: what the images may show.
        template: the caption of a label, with `{}` where the label goes, or several captions, whose embeddings are
            averaged. A model trained on captions knows sentences better than single words.
        batch_size: images per forward.

    Returns:
        For each image all labels, best first; their scores are the softmax of the model's logits and sum to 1.

    Raises:
        ValueError: the labels or the template are not allowed, or (as `ImageError`) an image cannot be read.
    """
    label_embeds = embed_labels(partial(encode_texts, model, processor), labels, template)
    image_embeds = encode_images(model, processor, images, batch_size)
    return _score(model, image_embeds, label_embeds, labels)


def classify_files(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    paths: Sequence[str | Path],
    labels: Sequence[str],
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    skipped: Skipped | None = None,
    batch_size: int = 16,
) -> list[tuple[Path, list[LabelScore]]]:
    """Score labels for image files, leaving out those that cannot be read.

    Args:
        model: in eval mode.
        processor: the model's processor.
        paths: the image files; read one batch at a time.
        labels: what the images may show.
        template: as in `classify`.
        skipped: collects the files left out; if None, a summary of them is logged at the end.
        batch_size: images per forward.

    Returns:
        Each file that could be read, in the order given, with what `classify` returns for it.

    Raises:
        ValueError: the labels or the template are not allowed, no image can be read, or one cannot and `skipped` is
            strict.
    """
    label_embeds = embed_labels(partial(encode_texts, model, processor), labels, template)
    kept, image_embeds = encode_files(model, processor, paths, skipped, batch_size)
    return list(zip(kept, _score(model, image_embeds, label_embeds, labels), strict=True))


def embed_labels(
    encode: Callable[[Sequence[str]], Tensor], labels: Sequence[str], template: str | Sequence[str] = DEFAULT_TEMPLATE
) -> Tensor:
    """Embed each label as the mean direction of its captions (Radford et al., 2021, section 3.1.4).

    Args:
        encode: T captions to their (T, D) embeddings, rows of length 1.
        labels: C labels, as in `fill_template`.
        template: one template or several.

    Returns:
        (C, D), rows of length 1.

    Raises:
        ValueError: a label or a template is not allowed, or there is none.
    """
    templates = [template] if isinstance(template, str) else template
    if not templates:
        raise ValueError("There is no template; give at least one.")
    captions = [caption for template in templates for caption in fill_template(labels, template)]
    embeds = encode(captions).view(len(templates), len(labels), -1)
    return normalize(embeds.mean(dim=0)) if len(templates) > 1 else embeds[0]


def load_templates(name: str) -> list[str]:
    """Load a list of templates.

    Args:
        name: a single template, which contains `{}`; the name of a list that comes with clipmini ("imagenet" or
            "simple"); or the path of a YAML file with a list of templates.

    Returns:
        The templates, at least one.

    Raises:
        ValueError: there is no such list or file, or it is not a list of templates.
    """
    if "{}" in name:
        return [name]
    folder = files("clipmini.configuration") / "templates"
    shipped = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    file = folder / f"{name}.yaml" if name in shipped else Path(name).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{name!r} is not a template; write one with {{}} where the label goes, or name a YAML file or one of "
            f"{', '.join(shipped)}."
        )
    try:
        templates = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if not (isinstance(templates, list) and templates and all(isinstance(item, str) for item in templates)):
        raise ValueError(f"{name} is not a list of templates; write one per line, each after a dash.")
    for template in templates:
        fill_template(["label"], template)
    return templates


def fill_template(labels: Sequence[str], template: str = DEFAULT_TEMPLATE) -> list[str]:
    """Make a caption of each label.

    Args:
        labels: at least one, none blank, no two the same, in UTF-8.
        template: contains `{}` where the label goes; other braces stay as they are. In UTF-8.

    Returns:
        A caption for each label.

    Raises:
        ValueError: a label or the template is not allowed.
    """
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no {{}} where the label goes; try {DEFAULT_TEMPLATE!r}.")
    check_text("template", template)
    if isinstance(labels, str) or not labels:
        raise ValueError(f"The labels {labels!r} are not allowed; give a list of at least one label.")
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise ValueError(f"Label {number} of {len(labels)} is blank; leave it out or fill it in.")
        check_text("label", label)
    if len(set(labels)) < len(labels):
        repeated = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"The label {repeated!r} is given twice and would compete with itself; leave one out.")
    return [template.replace("{}", label) for label in labels]


def _score(
    model: ClipMiniModel, image_embeds: Tensor, label_embeds: Tensor, labels: Sequence[str]
) -> list[list[LabelScore]]:
    scale = model.get_logit_scale().detach().float().cpu()
    bias = None if model.logit_bias is None else model.logit_bias.detach().float().cpu()
    logits = pairwise_logits(image_embeds, label_embeds, scale, bias)  # (I, C)
    if not logits.isfinite().all():
        raise ValueError("The model returns similarities that are NaN: its weights are damaged.")
    return [
        sorted(map(LabelScore, labels, scores), key=lambda item: -item.score)
        for scores in logits.softmax(dim=-1).tolist()
    ]
