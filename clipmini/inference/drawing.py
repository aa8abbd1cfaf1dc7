"""Draw what a search found: each query above its best images; and successes of a model beside its failures."""

import bisect
import itertools
import logging
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
GUTTER = 0.6  # between groups of examples
GREEN = "#059669"  # the frame of a correct image

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
HEADING = TEXT | {"fontsize": 18, "weight": "bold", "color": "#616e7c"}
SCORE = TEXT | {"fontsize": 10, "weight": "bold"}
NAME = TEXT | {"fontsize": 7.5, "color": "#666666"}


@dataclass(frozen=True)
class Picture:
    """An image as it is shown.

    Attributes:
        image: as `read_image` takes it.
        name: the name of its file.
        label: what is written below it: a score, a rank, a class.
        alt: what it shows, for those who cannot see it; "" if that is not known.
        is_correct: whether it is framed as a correct answer.
    """

    image: Any
    name: str
    label: str
    alt: str = ""
    is_correct: bool = False


@dataclass(frozen=True)
class Example:
    """A query and the images that it found; images that were classified have no query, and an empty title."""

    title: str
    pictures: Sequence[Picture]


def draw_results(query_hits: Mapping[str, Sequence[Hit]], out: str | Path) -> None:
    """Draw each query above its best images, with scores and file names: a row, or for a single query a square grid.

    Args:
        query_hits: hits of each query, best first; of each at most `MAX_DRAWN` are drawn, with a warning.
        out: the file to write, whole or not at all; its folder is created.

    Raises:
        ValueError: `out` cannot be such a file, or there is nothing to draw.
    """
    check_drawing(out)
    examples = [
        Example(query, [Picture(hit.image, hit.name, f"{hit.score:.3f}") for hit in hits[:MAX_DRAWN]])
        for query, hits in query_hits.items()
        if hits
    ]
    most = max(map(len, query_hits.values()), default=0)
    if most > MAX_DRAWN:
        logger.warning("only the best %d of %d images are drawn", MAX_DRAWN, most)
        most = MAX_DRAWN
    _draw({"": examples}, math.ceil(math.sqrt(most)) if len(examples) == 1 else most, out)


def draw_examples(groups: Mapping[str, Sequence[Example]], columns: int, out: str | Path) -> None:
    """Draw groups of examples side by side, each example a grid of images below its title.

    Args:
        groups: by heading; empty ones are left out.
        columns: of each grid.
        out: as in `draw_results`.

    Raises:
        ValueError: as `draw_results` does.
    """
    check_drawing(out)
    drawn = {heading: examples for heading, examples in groups.items() if examples}
    _draw(drawn, columns, out)


def _draw(groups: Mapping[str, Sequence[Example]], columns: int, out: str | Path) -> None:
    if not any(groups.values()):
        raise ValueError("There are no results to draw.")
    out = Path(out).expanduser()
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box.
        warnings.filterwarnings("ignore", message=r"(?s).*[Gg]lyph .*")
        figure = _draw_page(groups, columns)
        with atomic_write(out) as temporary_path:
            figure.savefig(temporary_path, format=out.suffix[1:].lower(), dpi=figure.dpi)


def _draw_page(groups: Mapping[str, Sequence[Example]], columns: int) -> Figure:
    group_width = max(columns, MIN_COLUMNS) * (CELL_WIDTH + GAP) - GAP
    width = len(groups) * (group_width + GUTTER) - GUTTER + 2 * MARGIN
    row_height = IMAGE_HEIGHT + CAPTION_HEIGHT + GAP
    heading_height = 1.5 * TITLE_LINE if any(groups) else 0

    # Examples that stand side by side begin and end at the same height.
    titles = [[_wrap_title(example.title, group_width) for example in examples] for examples in groups.values()]
    title_heights = [
        (max(map(len, beside)) + 0.3) * TITLE_LINE for beside in itertools.zip_longest(*titles, fillvalue=())
    ]
    nums_rows = [
        max(math.ceil(len(example.pictures) / columns) for example in beside if example)
        for beside in itertools.zip_longest(*groups.values())
    ]
    heights = [
        title_height + num_rows * row_height + 0.3 * TITLE_LINE
        for title_height, num_rows in zip(title_heights, nums_rows, strict=True)
    ]
    height = sum(heights) + heading_height + 2 * MARGIN - GAP
    # A huge page gets fewer dots per inch.
    figure = Figure((width, height), dpi=min(DPI, MAX_EDGE_DOTS / max(width, height)), facecolor="white")
    # Coordinates are inches from the top left corner.
    page = figure.add_axes((0, 0, 1, 1), autoscale_on=False, xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    for number, (heading, examples) in enumerate(groups.items()):
        left, top = MARGIN + number * (group_width + GUTTER), MARGIN
        page.text(left, top, heading, **HEADING)
        top += heading_height
        for index, example in enumerate(examples):
            for line_number, line in enumerate(titles[number][index]):
                page.text(left, top + line_number * TITLE_LINE, line, **TITLE)
            for place, picture in enumerate(example.pictures):
                row, column = divmod(place, columns)
                x, y = left + column * (CELL_WIDTH + GAP), top + title_heights[index] + row * row_height
                _draw_picture(page, picture, x, y)
            top += heights[index]
    return figure


def _draw_picture(page: Axes, picture: Picture, left: float, top: float) -> None:
    """Draw an image as large as fits its cell, undistorted, above its label and file name.

    The cell of one that cannot be read stays gray: it may be gone since it was indexed.
    """
    page.add_patch(Rectangle((left, top), CELL_WIDTH, IMAGE_HEIGHT, facecolor="#f3f3f3", edgecolor="none", zorder=-1))
    x, y = left + CELL_WIDTH / 2, top + IMAGE_HEIGHT / 2
    try:
        image = read_image(picture.image)
    except ImageError as error:
        source = picture.image if isinstance(picture.image, Path) else picture.name
        logger.warning("%s %s, and is not drawn", source, error)
    else:
        image.thumbnail((math.ceil(CELL_WIDTH * DPI), math.ceil(IMAGE_HEIGHT * DPI)))
        inches_per_pixel = min(CELL_WIDTH / image.width, IMAGE_HEIGHT / image.height)
        half_width, half_height = image.width * inches_per_pixel / 2, image.height * inches_per_pixel / 2
        extent = (x - half_width, x + half_width, y + half_height, y - half_height)
        page.imshow(image, extent=extent, aspect="auto", interpolation="antialiased")
    if picture.is_correct:
        page.add_patch(Rectangle((left, top), CELL_WIDTH, IMAGE_HEIGHT, fill=False, edgecolor=GREEN, linewidth=3))
    bottom = top + IMAGE_HEIGHT
    page.text(x, bottom + 0.05, picture.label, ha="center", **SCORE)
    page.text(x, bottom + 0.23, _shorten_name(picture.name), ha="center", **NAME)


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
