"""Draw what a search found: each query above its best images."""

import bisect
import logging
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font_names
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from clipmini.files import atomic_write, check_drawing
from modeling_clipmini.images_clipmini import ImageError, read_image

from .search import Hit

logger = logging.getLogger(__name__)

MAX_DRAWN = 100  # images per query; more could not be told apart
MAX_TITLE_LINES = 3

# Inches, and dots per inch.
CELL_WIDTH, IMAGE_HEIGHT, CAPTION_HEIGHT, GAP, MARGIN, TITLE_LINE = 2.2, 1.75, 0.42, 0.12, 0.2, 0.27
DPI, MAX_EDGE_DOTS = 150, 30_000
MIN_COLUMNS = 2  # of page width, so that a title above a single image has room

# DejaVu comes with matplotlib; the other fonts, where installed, have the characters that it lacks.
FONT_CANDIDATES = (
    "DejaVu Sans",
    *("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Noto Emoji"),
    *("Arial Unicode MS", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Segoe UI Emoji"),
)
FONTS = sorted(set(FONT_CANDIDATES) & set(get_font_names()), key=FONT_CANDIDATES.index)
# A dollar sign in a query or a file name starts no formula.
TEXT: dict[str, Any] = {"family": FONTS, "parse_math": False, "usetex": False, "va": "top"}
TITLE = TEXT | {"fontsize": 14, "weight": "bold"}
SCORE = TEXT | {"fontsize": 10, "weight": "bold"}
NAME = TEXT | {"fontsize": 7.5, "color": "#666666"}


def draw_results(query_hits: Mapping[str, Sequence[Hit]], out: str | Path) -> None:
    """Draw each query above its best images, with scores and file names: a row, or for a single query a square grid.

    Args:
        query_hits: hits of each query, best first; of each at most `MAX_DRAWN` are drawn, with a warning.
        out: the file to write, whole or not at all; its folder is created.

    Raises:
        ValueError: `out` cannot be such a file, there is nothing to draw, or an image can no longer be read.
    """
    check_drawing(out)
    drawn = {query: list(hits)[:MAX_DRAWN] for query, hits in query_hits.items() if hits}
    if not drawn:
        raise ValueError("There are no results to draw.")
    most = max(map(len, query_hits.values()))
    if most > MAX_DRAWN:
        logger.warning("only the best %d of %d images are drawn", MAX_DRAWN, most)
        most = MAX_DRAWN
    columns = math.ceil(math.sqrt(most)) if len(drawn) == 1 else most
    out = Path(out).expanduser()
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box.
        warnings.filterwarnings("ignore", message=r"(?s).*[Gg]lyph .*")
        figure = _draw_page(drawn, columns)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary_path:
            figure.savefig(temporary_path, format=out.suffix[1:].lower(), dpi=figure.dpi)


def _draw_page(query_hits: Mapping[str, Sequence[Hit]], columns: int) -> Figure:
    width = max(columns, MIN_COLUMNS) * (CELL_WIDTH + GAP) - GAP + 2 * MARGIN
    titles = {query: _wrap_title(query, width - 2 * MARGIN) for query in query_hits}
    row_height = IMAGE_HEIGHT + CAPTION_HEIGHT + GAP
    heights = {
        query: (len(titles[query]) + 0.6) * TITLE_LINE + math.ceil(len(hits) / columns) * row_height
        for query, hits in query_hits.items()
    }
    height = sum(heights.values()) + 2 * MARGIN - GAP
    # A huge page gets fewer dots per inch.
    figure = Figure((width, height), dpi=min(DPI, MAX_EDGE_DOTS / max(width, height)), facecolor="white")
    # Coordinates are inches from the top left corner.
    page = figure.add_axes((0, 0, 1, 1), autoscale_on=False, xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    top = MARGIN
    for query, hits in query_hits.items():
        for number, line in enumerate(titles[query]):
            page.text(MARGIN, top + number * TITLE_LINE, line, **TITLE)
        first_row = top + (len(titles[query]) + 0.3) * TITLE_LINE
        for index, hit in enumerate(hits):
            row, column = divmod(index, columns)
            _draw_hit(page, hit, MARGIN + column * (CELL_WIDTH + GAP), first_row + row * row_height)
        top += heights[query]
    return figure


def _draw_hit(page: Axes, hit: Hit, left: float, top: float) -> None:
    """Draw an image as large as fits its cell, undistorted, above its score and file name."""
    try:
        image = read_image(hit.image)
    except ImageError as error:
        raise ValueError(f"{hit.image} {error}, and cannot be drawn.") from None
    image.thumbnail((math.ceil(CELL_WIDTH * DPI), math.ceil(IMAGE_HEIGHT * DPI)))
    page.add_patch(Rectangle((left, top), CELL_WIDTH, IMAGE_HEIGHT, facecolor="#f3f3f3", edgecolor="none", zorder=-1))
    inches_per_pixel = min(CELL_WIDTH / image.width, IMAGE_HEIGHT / image.height)
    half_width, half_height = image.width * inches_per_pixel / 2, image.height * inches_per_pixel / 2
    x, y = left + CELL_WIDTH / 2, top + IMAGE_HEIGHT / 2
    extent = (x - half_width, x + half_width, y + half_height, y - half_height)
    page.imshow(image, extent=extent, aspect="auto", interpolation="antialiased")
    bottom = top + IMAGE_HEIGHT
    page.text(x, bottom + 0.05, f"{hit.score:.3f}", ha="center", **SCORE)
    page.text(x, bottom + 0.23, _shorten_name(hit.name), ha="center", **NAME)


def _wrap_title(title: str, width: float) -> list[str]:
    """Break a title into at most `MAX_TITLE_LINES` lines that are no wider than `width` inches."""
    title = _printable(title)

    def lines_of(limit: int) -> list[str]:
        return textwrap.wrap(title, limit, max_lines=MAX_TITLE_LINES, placeholder="…")

    limits = range(2, max(3, min(len(title), 1000) + 1))
    return lines_of(_largest(limits, lambda limit: all(_measure(line, TITLE) <= width for line in lines_of(limit))))


def _shorten_name(name: str) -> str:
    """Cut the middle out of a file name that is wider than a cell, since its ends tell more."""
    name = _printable(name)
    if _measure(name, NAME) <= CELL_WIDTH:
        return name

    def cut(half: int) -> str:
        return f"{name[:half]}…{name[-half:]}"

    return cut(_largest(range(1, max(2, len(name) // 2)), lambda half: _measure(cut(half), NAME) <= CELL_WIDTH))


def _largest(limits: range, fits: Callable[[int], bool]) -> int:
    """Return the largest limit that fits, or the smallest of all if none does."""
    return limits[max(0, bisect.bisect_left(limits, True, key=lambda limit: not fits(limit)) - 1)]


def _measure(text: str, style: Mapping[str, Any]) -> float:
    """Return the width of one line of text, in inches."""
    font = FontProperties(family=FONTS, size=style["fontsize"], weight=style.get("weight"))
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def _printable(text: str) -> str:
    """Replace each run of white space by a space, and what is no character, as in some file names, by "?"."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return "".join("?" if unicodedata.category(character) == "Cc" else character for character in text)
