"""A report as one HTML page that opens without a network: drawings and small pictures are inside it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset

from modeling_clipmini.images_clipmini import read_named

from .retrieval import Miss

TEMPLATE = Path(__file__).parent / "report.html"
THUMBNAIL = (256, 192)  # twice as fine as it is shown
QUALITY = 80
NUM_BEATEN_BY = 4  # pictures that are shown beside the right one


def render_page(**facts: Any) -> str:
    """Fill the template.

    Args:
        facts: the names that `report.html` uses; texts are escaped, drawings are not.

    Returns:
        The page.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**facts)


def show_misses(misses: Sequence[Miss], pairs: Dataset) -> list[dict[str, Any]]:
    """Give captions that were missed with the pictures that are shown beside them.

    Args:
        misses: as `measure_retrieval` finds them.
        pairs: the split that was measured.

    Returns:
        For each its `caption`, `rank`, `of` how many, the `own` picture and the `others` that beat it, each with
        `src`, `name` and `similarity`.
    """
    pictures = _Thumbnails(pairs)
    return [
        {
            "caption": miss.caption,
            "rank": f"{miss.rank:,}",
            "of": f"{len(pairs):,}",
            "own": pictures.show(miss.row, miss.similarity),
            "others": [pictures.show(row, similarity) for row, similarity in miss.beaten_by[:NUM_BEATEN_BY]],
        }
        for miss in misses
    ]


class _Thumbnails:
    """Small pictures of rows, as data URLs; each is made once."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs
        self.made: dict[int, tuple[str, str]] = {}

    def show(self, row: int, similarity: float) -> dict[str, str]:
        """Give a row's picture, its name, and how similar it is to the caption beside it."""
        if row not in self.made:
            content = self.pairs[row]
            image = content["image"]
            path = image.get("path") if isinstance(image, Mapping) else None
            name = Path(path).name if path else f"image {content['image_id']}"
            picture = read_named(image, name)
            picture.thumbnail(THUMBNAIL)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=QUALITY)
            self.made[row] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", name
        src, name = self.made[row]
        return {"src": src, "name": name, "similarity": f"{similarity:.3f}" if math.isfinite(similarity) else "-"}
