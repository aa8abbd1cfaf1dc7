"""Search images with words: an exact scan over a folder, and an image of what was found."""

import bisect
import logging
import math
import os
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from clipmini.data.images import Skipped, find_images
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.images_clipmini import ImageError, read_image

from .encode import check_text, encode_files, encode_texts

logger = logging.getLogger(__name__)

DRAWING_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
MAX_DRAWN = 100  # images per query; more cannot be told apart
MAX_TITLE_LINES = 3

# Inches, and dots per inch.
CELL_WIDTH, IMAGE_HEIGHT, CAPTION_HEIGHT, GAP, MARGIN, TITLE_LINE = 2.2, 1.75, 0.42, 0.12, 0.2, 0.27
DPI, MAX_EDGE_DOTS = 150, 30_000
TITLE = {"fontsize": 14, "weight": "bold"}
SCORE = {"fontsize": 10, "weight": "bold"}
NAME = {"fontsize": 7.5, "color": "#666666"}
MIN_COLUMNS = 2  # of page width, so that a title above a single image has room

# DejaVu comes with matplotlib; the rest, where installed, draw what it lacks.
FONTS = (
    "DejaVu Sans",
    *("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Noto Emoji"),
    *("Arial Unicode MS", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Segoe UI Emoji"),
)


@dataclass(frozen=True)
class Hit:
    """An image found, and its cosine similarity with the query, in [-1, 1]."""

    path: Path
    score: float


def search_folder(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    folder: str | Path,
    query: str,
    top: int = 9,
    skipped: Skipped | None = None,
) -> list[Hit]:
    """Find the images of a folder that fit a query best. For several queries, embed the folder once and `rank`.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        folder: where to look, sub-folders included.
        query: what the image should show, in words.
        top: how many to give; fewer where the folder holds fewer.
        skipped: is told of images that cannot be read; given none, a summary is logged at the end.

    Returns:
        The hits, best first.

    Raises:
        ValueError: query or `top` is not allowed, the folder has no image that can be read, or `skipped` is strict.
    """
    check_search(query, top)
    paths, embeds = embed_folder(model, processor, folder, skipped)
    return rank(paths, embeds, encode_texts(model, processor, [query])[0], top)


def embed_folder(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    folder: str | Path,
    skipped: Skipped | None = None,
    batch_size: int = 16,
) -> tuple[list[Path], Tensor]:
    """Embed the images of a folder, with one batch at most in memory.

    Args:
        model: in eval mode.
        processor: the one that came with the model.
        folder: where to look, sub-folders included.
        skipped: is told of images that cannot be read; given none, a summary is logged at the end.
        batch_size: images per forward.

    Returns:
        The paths that could be read, sorted, and their (I, D) embeddings, each of length 1.

    Raises:
        ValueError: the folder has no image that can be read, or `skipped` is strict and one cannot.
    """
    return encode_files(model, processor, find_images(folder), skipped, batch_size)


def rank(paths: Sequence[Path], embeddings: Tensor, query_embed: Tensor, top: int = 9) -> list[Hit]:
    """Sort images by their similarity with a query, by comparing with every one.

    Args:
        paths: I images.
        embeddings: (I, D), each of length 1.
        query_embed: (D,), of length 1.
        top: how many to give.

    Returns:
        The best `top`, best first, ties in the order of `paths`.

    Raises:
        ValueError: `top` is below 1, or a similarity is not a number.
    """
    _check_top(top)
    scores = embeddings @ query_embed  # (I,)
    if not scores.isfinite().all():
        raise ValueError("The model gives similarities that are no numbers: its weights are damaged.")
    order = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [Hit(paths[index], scores[index].item()) for index in order]


def check_search(query: str, top: int = 9, out: str | Path | None = None) -> None:
    """Find what is wrong with a search before anything slow is done for it.

    Args:
        query: what the image should show.
        top: how many images are wanted.
        out: where they are to be drawn, if at all.

    Raises:
        ValueError: the query is blank or not UTF-8, `top` is below 1, or the drawing's suffix is not supported.
    """
    if not query.strip():
        raise ValueError("The query is empty; say in words what the image should show.")
    check_text("query", query)
    _check_top(top)
    if out is not None:
        _check_drawing(out)


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top={top} is not allowed; ask for at least 1 image.")


def _check_drawing(out: str | Path) -> None:
    if Path(out).suffix.lower() not in DRAWING_SUFFIXES:
        raise ValueError(f"A drawing cannot be written to {out}; end its name in {', '.join(DRAWING_SUFFIXES)}.")


def draw_results(query_hits: Mapping[str, Sequence[Hit]], out: str | Path, columns: int | None = None) -> None:
    """Draw each query above its best images, with scores and file names.

    Args:
        query_hits: hits per query, best first; at most `MAX_DRAWN` of each are drawn, and a warning says so.
        out: the file to write, whole or not at all; its folder is made.
        columns: images per row; by default a row per query, or for a single query a grid as wide as high.

    Raises:
        ValueError: the suffix is not supported, there is nothing to draw, or an image can no longer be read.
    """
    drawn = {query: list(hits)[:MAX_DRAWN] for query, hits in query_hits.items() if hits}
    _check_drawing(out)
    if not drawn:
        raise ValueError("There are no results to draw.")
    most = max(map(len, query_hits.values()))
    if most > MAX_DRAWN:
        logger.warning("only the best %d of %d images are drawn", MAX_DRAWN, most)
    most = min(most, MAX_DRAWN)
    columns = min(most, columns or (math.ceil(math.sqrt(most)) if len(drawn) == 1 else most))
    with warnings.catch_warnings():
        # Where no installed font has a character, a box stands for it.
        warnings.filterwarnings("ignore", message=r"(?s).*[Gg]lyph .*")
        _draw_page(drawn, columns).save(Path(out).expanduser())


def _draw_page(query_hits: Mapping[str, Sequence[Hit]], columns: int) -> "_Page":
    page = _Page(max(columns, MIN_COLUMNS) * (CELL_WIDTH + GAP) - GAP + 2 * MARGIN)
    titles = {query: page.wrap(query) for query in query_hits}
    row_height = IMAGE_HEIGHT + CAPTION_HEIGHT + GAP
    heights = {
        query: (len(titles[query]) + 0.6) * TITLE_LINE + math.ceil(len(hits) / columns) * row_height
        for query, hits in query_hits.items()
    }
    page.set_height(sum(heights.values()) + 2 * MARGIN - GAP)
    top = MARGIN
    for query, hits in query_hits.items():
        for number, line in enumerate(titles[query]):
            page.write(line, MARGIN, top + number * TITLE_LINE, ha="left", **TITLE)
        first_row = top + (len(titles[query]) + 0.3) * TITLE_LINE
        for index, hit in enumerate(hits):
            row, column = divmod(index, columns)
            page.draw_hit(hit, MARGIN + column * (CELL_WIDTH + GAP), first_row + row * row_height)
        top += heights[query]
    return page


class _Page:
    """A figure whose places are inches from its top left corner."""

    def __init__(self, width: float) -> None:
        self.width, self.height = width, 1.0
        self.figure = Figure(figsize=(width, 1.0), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        installed = set(get_font_names())
        # A dollar sign in a query or a file name begins no formula.
        self.font: dict[str, Any] = {
            "family": [name for name in FONTS if name in installed],
            "parse_math": False,
            "usetex": False,
        }

    def set_height(self, height: float) -> None:
        """Make the page as high as its contents; of a huge one the resolution gives way."""
        self.height = height
        self.figure.set_size_inches(self.width, height)
        self.figure.set_dpi(min(DPI, MAX_EDGE_DOTS / max(self.width, height)))

    def fits(self, text: str, width: float, **style: Any) -> bool:
        """Tell whether a line of text is no wider than `width`."""
        extent = Text(0, 0, text, figure=self.figure, **self.font, **style).get_window_extent(
            self.canvas.get_renderer()
        )
        return extent.width <= width * self.figure.dpi

    def wrap(self, title: str) -> list[str]:
        """Break a title into lines that fit the page."""
        title = _printable(title)

        def lines_of(limit: int) -> list[str]:
            return textwrap.wrap(title, limit, max_lines=MAX_TITLE_LINES, placeholder="…")

        def is_too_wide(limit: int) -> bool:
            return not all(self.fits(line, self.width - 2 * MARGIN, **TITLE) for line in lines_of(limit))

        limits = range(2, max(3, min(len(title), 1000) + 1))
        return lines_of(limits[max(0, bisect.bisect_left(limits, True, key=is_too_wide) - 1)])

    def shorten(self, name: str) -> str:
        """Cut out the middle of a file name that is wider than a cell: its ends say more."""
        name = _printable(name)
        if self.fits(name, CELL_WIDTH, **NAME):
            return name

        def cut(half: int) -> str:
            return f"{name[:half]}…{name[-half:]}"

        halves = range(1, max(2, len(name) // 2))
        widest = bisect.bisect_left(halves, True, key=lambda half: not self.fits(cut(half), CELL_WIDTH, **NAME))
        return cut(halves[max(0, widest - 1)])

    def write(self, text: str, left: float, top: float, **style: Any) -> None:
        """Write one line."""
        self.figure.text(left / self.width, 1 - top / self.height, text, va="top", **self.font, **style)

    def draw_hit(self, hit: Hit, left: float, top: float) -> None:
        """Draw an image as large as its cell lets it be, undistorted, over its score and file name."""
        try:
            image = read_image(hit.path)
        except ImageError as error:
            raise ValueError(f"{hit.path} {error}, and cannot be drawn.") from None
        image.thumbnail((math.ceil(CELL_WIDTH * DPI), math.ceil(IMAGE_HEIGHT * DPI)))
        box = (
            left / self.width,
            1 - (top + IMAGE_HEIGHT) / self.height,
            CELL_WIDTH / self.width,
            IMAGE_HEIGHT / self.height,
        )
        self.figure.add_artist(Rectangle(box[:2], box[2], box[3], facecolor="#f3f3f3", edgecolor="none", zorder=-1))
        axes = self.figure.add_axes(box)
        axes.imshow(image, interpolation="antialiased")
        axes.set_axis_off()
        center, below = left + CELL_WIDTH / 2, top + IMAGE_HEIGHT
        self.write(f"{hit.score:.3f}", center, below + 0.05, ha="center", **SCORE)
        self.write(self.shorten(hit.path.name), center, below + 0.23, ha="center", **NAME)

    def save(self, out: Path) -> None:
        """Write the file beside its place, then move it there."""
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            self.figure.savefig(beside, format=out.suffix[1:].lower(), dpi=self.figure.dpi)
            os.replace(beside, out)
        finally:
            beside.unlink(missing_ok=True)


def _printable(text: str) -> str:
    """Put a single space for white space, and a question mark for what is no character, as in some file names."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return "".join("?" if unicodedata.category(character) == "Cc" else character for character in text)
