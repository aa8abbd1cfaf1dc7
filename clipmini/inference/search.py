"""Search images with words: compare a query with every image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from clipmini.data.images import Skipped
from clipmini.html import render

MAX_SHOWN = 30  # in a notebook, whose file holds every thumbnail
GRID = """<div style="font:13px system-ui,sans-serif"><p><b>{{ query }}</b></p>
<div style="display:flex;flex-wrap:wrap;gap:12px">
{%- for hit in hits %}
<figure style="margin:0;width:128px">{{ picture(hit.image) }}
<figcaption title="{{ hit.name }}" style="overflow:hidden;text-overflow:ellipsis;white-space:nowrap">
<b>{{ "%.3f" | format(hit.score) }}</b> {{ hit.name }}</figcaption></figure>
{%- endfor %}
</div>{% if num_more %}<p>and {{ num_more }} more</p>{% endif %}</div>"""


@dataclass(frozen=True)
class Hit:
    """An image that was found, by its path or itself, and its cosine similarity to the query, in [-1, 1]."""

    image: Path | Image
    score: float

    @property
    def name(self) -> str:
        """The name of the image's file, or "" for a Pillow image without a file."""
        return Path(getattr(self.image, "filename", "") if isinstance(self.image, Image) else self.image).name


@dataclass(frozen=True, repr=False)
class Hits(Sequence[Hit]):
    """What a search found: a sequence of `Hit`, the best first.

    Attributes:
        query: what was searched for.
        hits: the images that were found.
        skipped: images that cannot be read.
    """

    query: str
    hits: list[Hit]
    skipped: Skipped = field(default_factory=Skipped)

    def __getitem__(self, index: Any) -> Any:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __repr__(self) -> str:
        more = f" and {len(self) - 1} more" if len(self) > 1 else ""
        return f"<hits for {self.query!r}: {self[0].name} ({self[0].score:.3f}){more}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the hits, ready for JSON; `path` is null for a Pillow image."""
        hits = [
            {"path": None if isinstance(hit.image, Image) else str(hit.image), "score": hit.score} for hit in self.hits
        ]
        return {"query": self.query, "hits": hits, **self.skipped.to_dict()}

    def _repr_html_(self) -> str:
        shown = self.hits[:MAX_SHOWN]
        return render(GRID, query=self.query, hits=shown, num_more=len(self) - len(shown))


def rank(images: Sequence[Path | Image], embeddings: Tensor, query_embed: Tensor, top: int = 9) -> list[Hit]:
    """Sort images by their similarity to a query, comparing it with every image.

    For several queries, embed the images once with `DualEncoder.encode_files`.

    Args:
        images: I images.
        embeddings: (I, D), rows of length 1.
        query_embed: (D,), of length 1.
        top: number of images to return, at least 1.

    Returns:
        The `top` best hits, best first; equal scores in the order of `images`.

    Raises:
        ValueError: a similarity is not finite.
    """
    assert top >= 1, top
    scores = embeddings @ query_embed  # (I,)
    if not scores.isfinite().all():
        raise ValueError("The model returns similarities that are NaN: its weights are damaged.")
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [Hit(images[index], scores[index].item()) for index in order]
