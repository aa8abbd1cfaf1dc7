"""Search images: what a query is, what it finds, and how its vector is compared with that of every image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from clipmini.data.images import Skipped
from clipmini.html import render
from clipmini.names import expand
from modeling_clipmini.modeling_clipmini import normalize

from .embed import DualEncoder
from .prompts import IMAGE_PREFIX, is_image, warn_of_unreadable

COSINE, NORMALIZED = "cosine", "normalized"  # kinds of scores
NEAR_COPY = 0.98  # cosine of two images from which on one is shown for both
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
    """An image that was found.

    Attributes:
        image: its path; or the image itself, if it lies in no file. That of an index has its key as `filename`.
        score: its cosine similarity to the query, in [-1, 1]; less the image's prior where `Hits.scoring` says so.
    """

    image: Path | Image
    score: float

    @property
    def path(self) -> str | None:
        """The path of the image's file, or its key in an index; None for a Pillow image that has neither."""
        return getattr(self.image, "filename", None) or None if isinstance(self.image, Image) else str(self.image)

    @property
    def name(self) -> str:
        """The name of the image's file, or "" for a Pillow image without a file."""
        return Path(self.path or "").name


@dataclass(frozen=True, repr=False)
class Hits(Sequence[Hit]):
    """What a search found: a sequence of `Hit`, the best first.

    Attributes:
        query: what was searched for.
        hits: the images that were found.
        skipped: images that cannot be read.
        scoring: what the scores are: `COSINE`, or `NORMALIZED` by priors, so that no image fits every query.
    """

    query: str
    hits: list[Hit]
    skipped: Skipped = field(default_factory=Skipped)
    scoring: str = COSINE

    def __getitem__(self, index: Any) -> Any:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __repr__(self) -> str:
        if not self:
            return f"<no hits for {self.query!r}>"
        more = f" and {len(self) - 1} more" if len(self) > 1 else ""
        return f"<hits for {self.query!r}: {self[0].name} ({self[0].score:.3f}){more}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the hits, ready for JSON; `path` is null for a Pillow image that has no name."""
        hits = [{"path": hit.path, "score": hit.score} for hit in self.hits]
        return {"query": self.query, "scoring": self.scoring, "hits": hits, **self.skipped.to_dict()}

    def _repr_html_(self) -> str:
        shown = self.hits[:MAX_SHOWN]
        return render(GRID, query=self.query, hits=shown, num_more=len(self) - len(shown))


@dataclass(frozen=True)
class Query:
    """What is searched for, as a vector.

    Attributes:
        text: the query in words, as results show it.
        vector: (D,), of length 1.
        is_words: whether it is made of words alone: only then do the priors of images, which are those of captions,
            apply to it.
    """

    text: str
    vector: Tensor
    is_words: bool


def embed_queries(
    encoder: DualEncoder,
    queries: Sequence[str | Image],
    plus: Sequence[str | Image] = (),
    minus: Sequence[str | Image] = (),
    find_vector: Callable[[str], Tensor | None] = lambda name: None,
) -> list[Query]:
    """Turn queries into vectors of length 1: the query's, plus those of some terms, minus those of others.

    Args:
        encoder: the model.
        queries: words, `image:` and the path of an image, or Pillow images; one search for each.
        plus: terms to add to every query, likewise.
        minus: terms to subtract from every query, likewise.
        find_vector: returns the vector of an image that is named after `image:`, if it is known already.

    Raises:
        ValueError: an image cannot be read, or nothing is left of a query.
    """
    terms = [*queries, *plus, *minus]
    words = [index for index, term in enumerate(terms) if not is_image(term)]
    texts = [str(terms[index]) for index in words]
    warn_of_unreadable(encoder.tokenizer, texts, "queries")
    vectors: dict[int, Tensor] = dict(zip(words, encoder.encode_texts(texts), strict=True))
    for index, term in enumerate(terms):
        if index not in vectors:
            name = expand(term.removeprefix(IMAGE_PREFIX)) if isinstance(term, str) else ""
            known = find_vector(name) if name else None
            vectors[index] = encoder.encode_images([name or term])[0] if known is None else known
    first_minus = len(queries) + len(plus)
    added, subtracted = range(len(queries), first_minus), range(first_minus, len(terms))
    composed = []
    for number, query in enumerate(queries):
        vector = vectors[number] + sum(vectors[i] for i in added) - sum(vectors[i] for i in subtracted)
        if vector.norm() < 1e-3:
            raise ValueError(f"Nothing is left of the query {_name(query)!r}: its terms cancel out; leave one out.")
        text = " + ".join(map(_name, [query, *plus]))
        text = " - ".join([text, *map(_name, minus)])
        is_words = not any(map(is_image, [query, *plus, *minus]))
        composed.append(Query(text, normalize(vector[None])[0], is_words))
    return composed


def _name(term: str | Image) -> str:
    return term if isinstance(term, str) else Path(getattr(term, "filename", "")).name or "an image"


def rank(
    images: Sequence[Path | Image],
    embeddings: Tensor,
    query_embed: Tensor,
    top: int = 9,
    priors: Tensor | None = None,
    collapse: bool = False,
) -> list[Hit]:
    """Sort images by their similarity to a query, comparing it with every image.

    For several queries, embed the images once with `DualEncoder.encode_files`.

    Args:
        images: I images.
        embeddings: (I, D), rows of length 1.
        query_embed: (D,), of length 1.
        top: number of images to return, at least 1.
        priors: (I,) to subtract from the similarities, see `Bank`; by default nothing.
        collapse: leave out images that are near-copies of a better one, by a cosine of `NEAR_COPY` or more.

    Returns:
        The `top` best hits, best first; equal scores in the order of `images`.

    Raises:
        ValueError: a similarity is not finite.
    """
    assert top >= 1, top
    scores = embeddings @ query_embed  # (I,)
    if not scores.isfinite().all():
        raise ValueError("The model returns similarities that are NaN: its weights are damaged.")
    if priors is not None:
        scores = scores - priors
    kept: list[int] = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        if len(kept) == top:
            break
        if not (collapse and kept) or (embeddings[kept] @ embeddings[row]).max() < NEAR_COPY:
            kept.append(row)
    return [Hit(images[row], scores[row].item()) for row in kept]
