"""What an evaluation writes: `results.json`, a Markdown table, an entry for a model card, and one page.

The page opens without a network: drawings and small images are inside it.
"""

import base64
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from datasets import Dataset

from clipmini.files import RECIPE_FILE, RESULTS_FILE, RunRecord
from modeling_clipmini.images_clipmini import read_named

from .measure import Miss

TABLE_FILE, INDEX_FILE, PAGE_FILE = "results.md", "model-index.yaml", "report.html"
FILES = (TABLE_FILE, INDEX_FILE, PAGE_FILE, RESULTS_FILE)


@dataclass(frozen=True)
class Table:
    """A table of a report: the same in Markdown and on the page.

    Attributes:
        title: what stands above it.
        columns: their names.
        rows: text of every cell.
        note: what a reader should know of it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Give the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows] if self.columns else []
        table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        return "\n".join(filter(None, [f"**{self.title}**\n", table, self.note and f"{self.note}\n"]))


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        results: all figures, as `results.json` holds them.
        tables: what `results.md` holds.
        page: the HTML.
        warnings: what to know before the figures are trusted, in plain words.
    """

    results: dict[str, Any]
    tables: list[Table]
    page: str
    warnings: tuple[str, ...] = ()

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the four files; `results.json` comes last, and is there only if the others are.

        Args:
            folder: is made; what else stands in one that is there already stays.
            overwrite: replace an evaluation that is there.

        Raises:
            ValueError: the folder holds an evaluation.
        """
        check_folder(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        RunRecord(folder).add(folder / name for name in FILES)
        # Within the folder, which may be a file system of its own, so that every file can be renamed into place.
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as beside:
            index = {"model-index": self.results["model_index"]}
            contents = {
                TABLE_FILE: "\n".join(table.markdown() for table in self.tables),
                INDEX_FILE: yaml.safe_dump(index, sort_keys=False, allow_unicode=True),
                PAGE_FILE: self.page,
                RESULTS_FILE: json.dumps(self.results, indent=2) + "\n",  # last: it says that all is there
            }
            for name, content in contents.items():
                Path(beside, name).write_text(content, encoding="utf-8")
            (folder / RESULTS_FILE).unlink(missing_ok=True)
            for name in contents:
                Path(beside, name).replace(folder / name)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to, before hours are spent on what goes there.

    Raises:
        ValueError: it is no folder, or one that cannot be written to; it is a training run's; or it holds an
            evaluation, and `overwrite` is not set, or a file that no evaluation wrote.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file; name a folder with --out.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{nearest} cannot be written to ({error.strerror}); name another with --out.") from error
    if (folder / RECIPE_FILE).exists():
        raise ValueError(
            f"{folder} holds a training run, whose {RESULTS_FILE} would be lost; name another with --out."
        )
    recorded = RunRecord(folder).read()
    if others := [name for name in FILES if (folder / name).exists() and name not in recorded]:
        raise ValueError(f"{folder} holds {others[0]}, which no evaluation wrote; name another with --out.")
    if (folder / RESULTS_FILE).exists() and not overwrite:
        raise ValueError(f"{folder} holds an evaluation; pass --overwrite, or --out another folder.")


def as_json(value: Any) -> Any:
    """Turn results into what JSON holds: NaN and infinity become null, arrays lists."""
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


TEMPLATE = Path(__file__).parent / "report.html"
THUMBNAIL = (256, 192)  # twice as fine as it is shown
QUALITY = 80
NUM_BEATEN_BY = 4  # images that are shown beside the right one


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
    """Give captions that were missed with the images that are shown beside them.

    Args:
        misses: as `measure_retrieval` finds them.
        pairs: the split that was measured.

    Returns:
        For each its `caption`, `rank`, `of` how many, the `own` image and the `others` that beat it, each with
        `src`, `name` and `similarity`.
    """
    images = _Thumbnails(pairs)
    return [
        {
            "caption": miss.caption,
            "rank": f"{miss.rank:,}",
            "of": f"{len(pairs):,}",
            "own": images.show(miss.row, miss.similarity),
            "others": [images.show(row, similarity) for row, similarity in miss.beaten_by[:NUM_BEATEN_BY]],
        }
        for miss in misses
    ]


class _Thumbnails:
    """Small images of rows, as data URLs; each is made once."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs
        self.made: dict[int, tuple[str, str]] = {}

    def show(self, row: int, similarity: float) -> dict[str, str]:
        """Give a row's image, its name, and how similar it is to the caption beside it."""
        if row not in self.made:
            content = self.pairs[row]
            given = content["image"]
            path = given.get("path") if isinstance(given, Mapping) else None
            name = Path(path).name if path else f"image {content['image_id']}"
            image = read_named(given, name)
            image.thumbnail(THUMBNAIL)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=QUALITY)
            self.made[row] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", name
        src, name = self.made[row]
        return {"src": src, "name": name, "similarity": f"{similarity:.3f}" if math.isfinite(similarity) else "-"}
