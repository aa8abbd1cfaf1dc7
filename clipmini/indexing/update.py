"""Bring an index up to date with its sources: embed what is new, follow what was renamed, drop what is gone."""

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from tqdm.auto import tqdm

from clipmini.data.images import Skipped
from clipmini.inference.embed import DualEncoder, prepare_ahead
from clipmini.store import digest
from modeling_clipmini.encoding_clipmini import embed_in_batches
from modeling_clipmini.images_clipmini import ImageError, open_image, read_file, read_image
from modeling_clipmini.modeling_clipmini import normalize

from .index import Index
from .listing import Entry, list_images

BATCH_SIZE = 16
NUM_PER_WRITE = 256  # images in a transaction: what a killed run loses
THUMBNAIL_SIZE, THUMBNAIL_QUALITY = 448, 85  # pixels of the longer edge, and JPEG's quality
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class Changes:
    """What a run did to an index.

    Attributes:
        num_embedded: images that were embedded.
        num_moved: images that were renamed, copied or touched: known by their content, and not embedded again.
        num_unchanged: images that the index had already.
        num_dropped: images that are gone from their source.
        num_images: images in the index now.
        skipped: images that cannot be read.
    """

    num_embedded: int
    num_moved: int
    num_unchanged: int
    num_dropped: int
    num_images: int
    skipped: Skipped = field(default_factory=Skipped)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, and what was skipped, ready for JSON."""
        numbers = {name: value for name, value in vars(self).items() if name != "skipped"}
        return {**numbers, **self.skipped.to_dict()}


@dataclass(frozen=True)
class Prepared:
    """An image that has been read.

    Attributes:
        row: what the index holds of it besides its vector.
        inputs: what the tower takes, from `DualEncoder.prepare_image`; None if its vector is known.
    """

    row: dict[str, Any]
    inputs: Any


def embed_here(
    index: Index,
    entries: Sequence[Entry],
    digests: Collection[str],
    skipped: Skipped,
    on_progress: Callable[[int], Any],
) -> tuple[list[str], list[str]]:
    """Embed images on this machine and write them to an index; see `prepare_all` and `embed_and_write`."""
    before = Index(index.path, index.encoder)
    return embed_and_write(index, prepare_all(index.encoder, entries, digests, skipped, on_progress), before)


def update_index(
    index: Index,
    sources: Sequence[str | Path],
    skipped: Skipped,
    *,
    wait: bool = False,
    embed: Callable[..., tuple[list[str], list[str]]] = embed_here,
) -> Changes:
    """Embed the images of some sources that are new or changed, and drop those that are gone from them.

    An image is unchanged if its file has the size, the time and the captions that the index knows. If not, its content
    decides: what is known under another name, or was only touched, is not embedded again. Images of other sources
    stay, and so do those in folders that cannot be looked into.

    Args:
        index: the index; an image is in it as soon as its batch of `NUM_PER_WRITE` is embedded.
        sources: as in `list_images`.
        skipped: collects images that cannot be read, which are tried again the next time.
        wait: for another process that is writing to the index.
        embed: embeds and writes images, as `embed_here` does.

    Raises:
        ValueError: a source cannot be reached, the model is not that of the index, the disk is full, or another
            process writes to the index.
    """
    with index.locked(wait):
        listings = [list_images(source, skipped) for source in sources]
        known = index.known()
        entries = {entry.key: entry for listing in listings for entry in listing.entries}
        changed = [entry for key, entry in entries.items() if key not in known or known[key].state != entry.state]
        embedded: list[str] = []
        moved: list[str] = []
        if changed:
            digests = {image.digest for image in known.values()}
            with tqdm(total=len(changed), desc="indexing", unit="image", leave=False) as bar:
                embedded, moved = embed(index, changed, digests, skipped, bar.update)
        unreachable = {listing.source: listing.unreachable for listing in listings}
        gone = {
            key: image.digest
            for key, image in known.items()
            if key not in entries and image.source in unreachable and not _is_below(key, unreachable[image.source])
        }
        index.remove_keys(list(gone))
        if changed or gone:
            index.optimize()
        known_again = set(moved)
        num_renamed = sum(digest in known_again for digest in gone.values())
    skipped.log_summary()
    return Changes(
        num_embedded=len(embedded),
        num_moved=len(moved),
        num_unchanged=len(entries) - len(changed),
        num_dropped=len(gone) - num_renamed,
        num_images=len(index),
        skipped=skipped,
    )


def prepare_all(
    encoder: DualEncoder,
    entries: Iterable[Entry],
    digests: Collection[str],
    skipped: Skipped,
    on_progress: Callable[[int], Any] = lambda number: None,
) -> Iterator[Prepared]:
    """Read images ahead of the tower, as `prepare_ahead` does.

    Args:
        encoder: the model.
        entries: the images.
        digests: of images whose vectors are known.
        skipped: collects images that cannot be read.
        on_progress: called with 1 after each image.

    Yields:
        The images that can be read, in the order of the entries.
    """
    entries = list(entries)
    ahead = prepare_ahead(lambda _, entry: prepare(encoder, entry, digests), entries, encoder.device)
    for entry, prepared in zip(entries, ahead, strict=True):
        if isinstance(prepared, ImageError):
            skipped.add(entry.key, str(prepared))
        else:
            yield prepared
        on_progress(1)


def prepare(encoder: DualEncoder, entry: Entry, digests: Collection[str] = ()) -> Prepared:
    """Read an image, and make what the tower takes of it unless its vector is known.

    Args:
        encoder: the model.
        entry: the image.
        digests: of images whose vectors are known.

    Raises:
        ImageError: it cannot be read.
    """
    content = read_file(entry.image) if entry.has_file else entry.read_bytes()
    with open_image(content) as opened:  # which refuses what is no image
        facts = _read_facts(opened)
    assert content is not None
    row = {**entry.as_row(), "digest": digest(content).hex(), **facts}
    is_known = row["digest"] in digests
    if is_known and entry.has_file:
        return Prepared(row, None)
    image = read_image(content, min_edge=encoder.min_edge if entry.has_file else None)  # else the thumbnail is small
    if not entry.has_file:
        row["thumbnail"] = _make_thumbnail(image)
    return Prepared(row, None if is_known else encoder.prepare_image(image))


def embed_and_write(index: Index, prepared: Iterable[Prepared], before: Index) -> tuple[list[str], list[str]]:
    """Embed images and write them to an index, `NUM_PER_WRITE` in a transaction.

    Args:
        index: the index.
        prepared: the images; no two with one key.
        before: the index as it was opened when `prepare_all` was told which vectors are known. It does not see what
            is written here: where names are exchanged, one image may replace another whose vector is still needed.

    Returns:
        The digests of the images that were embedded, and of those whose vectors were known.

    Raises:
        ValueError: a vector is not finite, or the disk is full.
    """
    rest = iter(prepared)
    num_dimensions, bank = index.manifest.num_dimensions, index.encoder.bank
    embedded: list[str] = []
    moved: list[str] = []
    while True:
        new: list[dict[str, Any]] = []
        known: list[dict[str, Any]] = []

        def take_inputs(new: list[dict[str, Any]] = new, known: list[dict[str, Any]] = known) -> Iterator[Any]:
            for item in itertools.islice(rest, NUM_PER_WRITE):
                (known if item.inputs is None else new).append(item.row)
                if item.inputs is not None:
                    yield item.inputs

        embeds = embed_in_batches(take_inputs(), index.encoder.model.embed_pixels, BATCH_SIZE)
        embeds = normalize(embeds) if new else torch.empty(0, num_dimensions)
        if not (new or known):
            return embedded, moved
        if not embeds.isfinite().all():
            raise ValueError("The model returns vectors that are NaN: its weights are damaged.")
        priors = torch.zeros(len(new)) if bank is None else bank.prior_of_images(embeds)
        old_embeds, old_priors = before.vectors_of([row["digest"] for row in known])
        index.write(new + known, torch.cat([embeds, old_embeds]), torch.cat([priors, old_priors]))
        embedded += [row["digest"] for row in new]
        moved += [row["digest"] for row in known]


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(os.path.join(os.path.abspath(folder), "")) for folder in folders)


def _read_facts(image: Image.Image) -> dict[str, Any]:
    """Return size, date and place of an image whose header was read; damaged EXIF data is as good as none."""
    width, height = image.size
    facts: dict[str, Any] = {"width": width, "height": height}
    with suppress(Exception):  # EXIF data can hold anything, and Pillow's readers then raise nearly anything
        exif = image.getexif()
        if exif.get(ExifTags.Base.Orientation) in SWAPPED:
            facts["width"], facts["height"] = height, width
        with suppress(Exception):
            taken = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
            text = str(taken or exif[ExifTags.Base.DateTime]).strip("\0 ")
            facts["date"] = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").isoformat(" ")
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        tags = ExifTags.GPS
        latitude = _degrees(gps[tags.GPSLatitude], "NS".index(gps[tags.GPSLatitudeRef]), limit=90)
        longitude = _degrees(gps[tags.GPSLongitude], "EW".index(gps[tags.GPSLongitudeRef]), limit=180)
        facts["latitude"], facts["longitude"] = latitude, longitude
    return facts


def _degrees(parts: Sequence[Any], is_negative: int, limit: int) -> float:
    degrees, minutes, seconds = map(float, parts)
    value = (degrees + minutes / 60 + seconds / 3600) * (-1 if is_negative else 1)
    if not math.fabs(value) <= limit:  # NaN too
        raise ValueError(value)
    return value


def _make_thumbnail(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    stream = BytesIO()
    image.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
    return stream.getvalue()
