"""Classify images by labels given as words, without training on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from clipmini.data.images import Skipped
from clipmini.html import render
from modeling_clipmini.modeling_clipmini import normalize

from .embed import DualEncoder
from .prompts import check_distinct, fill_template, warn_of_unreadable

MAX_SHOWN, MAX_BARS = 30, 5  # in a notebook: images, and labels of each
BARS = """<div style="font:13px system-ui,sans-serif;display:flex;flex-wrap:wrap;gap:18px">
{%- for image in images %}
<div style="display:flex;gap:10px">{{ picture(image.image) }}<table style="margin:0;font-size:13px">
{%- for item in image.scores[:max_bars] %}
<tr><td style="text-align:left">{{ item.label }}</td><td style="text-align:left">
<div style="display:inline-block;height:9px;background:#2563eb;width:{{ (100 * item.score) | round(1) }}px"></div>
{{ "%.1f" | format(100 * item.score) }} %</td></tr>
{%- endfor %}
</table></div>
{%- endfor %}
</div>{% if num_more %}<p>and {{ num_more }} more</p>{% endif %}"""


@dataclass(frozen=True)
class LabelScore:
    """A label and the probability that an image shows it rather than one of the other labels."""

    label: str
    score: float


@dataclass(frozen=True)
class ClassifiedImage:
    """An image, by its path or itself, with all labels, the best first; their scores sum to 1."""

    image: Path | Image
    scores: list[LabelScore]

    @property
    def label(self) -> str:
        """The best label."""
        return self.scores[0].label


@dataclass(frozen=True, repr=False)
class Classification(Sequence[ClassifiedImage]):
    """A sequence of `ClassifiedImage`, in the order of the images.

    Attributes:
        template: the caption of a label, or the name of a list of captions.
        images: the images that could be read.
        skipped: those that could not.
    """

    template: str | Sequence[str]
    images: list[ClassifiedImage]
    skipped: Skipped = field(default_factory=Skipped)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        best = self[0].scores[0]
        more = f" and {len(self) - 1} more" if len(self) > 1 else ""
        return f"<classified: {best.label!r} ({best.score:.1%}){more}>"

    def to_dict(self) -> dict[str, Any]:
        """Return labels and scores, ready for JSON; `path` is null for a Pillow image."""
        results = [
            {
                "path": None if isinstance(item.image, Image) else str(item.image),
                "scores": [asdict(score) for score in item.scores],
            }
            for item in self.images
        ]
        template = self.template if isinstance(self.template, str) else list(self.template)
        return {"template": template, "results": results, **self.skipped.to_dict()}

    def _repr_html_(self) -> str:
        shown = self.images[:MAX_SHOWN]
        return render(BARS, images=shown, num_more=len(self) - len(shown), max_bars=MAX_BARS)


def classify(
    encoder: DualEncoder,
    images: Sequence[str | Path | Image],
    labels: Sequence[str],
    templates: Sequence[str],
    skipped: Skipped | None = None,
) -> list[ClassifiedImage]:
    """Score labels for images, as transformers' zero-shot image classification pipeline does.

    Args:
        encoder: with a logit scale.
        images: image files or Pillow images.
        labels: as in `fill_template`.
        templates: likewise; their embeddings are averaged. A model trained on captions knows sentences better than
            single words.
        skipped: collects the images that cannot be read.

    Returns:
        Each image that could be read, in the order given; scores are the softmax of the model's logits.

    Raises:
        ValueError: the labels or the templates are not allowed, or `encode_files` raises it.
    """
    label_embeds = embed_labels(encoder, labels, templates)
    kept, image_embeds = encoder.encode_files(images, skipped)
    logits = encoder.logit_scale * image_embeds @ label_embeds.T  # (I, C); a bias would change no softmax
    if not logits.isfinite().all():
        raise ValueError("The model returns similarities that are NaN: its weights are damaged.")
    return [
        ClassifiedImage(image, sorted(map(LabelScore, labels, scores), key=lambda item: -item.score))
        for image, scores in zip(kept, logits.softmax(dim=-1).tolist(), strict=True)
    ]


def embed_labels(encoder: DualEncoder, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embed each label as the mean direction of its captions (Radford et al., 2021, section 3.1.4).

    Args:
        encoder: the model; of labels that it cannot read, a warning is logged.
        labels: C labels, as in `fill_template`.
        templates: as in `fill_template`.

    Returns:
        (C, D), rows of length 1.

    Raises:
        ValueError: a label or a template is not allowed, there is none, or two labels are one text to the model.
    """
    if not templates:
        raise ValueError("There is no template; give at least one.")
    captions = [caption for template in templates for caption in fill_template(labels, template)]
    warn_of_unreadable(encoder.tokenizer, labels, "labels")
    check_distinct(encoder.tokenizer, labels)
    embeds = encoder.encode_texts(captions).view(len(templates), len(labels), -1)
    return normalize(embeds.mean(dim=0)) if len(templates) > 1 else embeds[0]
