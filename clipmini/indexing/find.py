"""Find images in a folder or a list: by an index that is kept for the folder, or by looking at each image."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clipmini.data.images import Skipped, expand_files, find_images
from clipmini.files import atomic_write
from clipmini.inference.encoders import load_encoder
from clipmini.inference.search import COSINE, NORMALIZED, Hits, embed_queries, rank
from clipmini.names import ONNX_INT8, expand, is_index, is_utf8
from clipmini.store import SPACE_FILE, digest, indexes_folder

logger = logging.getLogger(__name__)

NEEDS_EXTRA = "needs lancedb, which is not installed: pip install 'clipmini[search]'"


def find(
    model: Any,
    images: Any,
    queries: Sequence[str | Image],
    top: int,
    *,
    plus: Sequence[str | Image] = (),
    minus: Sequence[str | Image] = (),
    where: str | None = None,
    collapse: bool = False,
    use_index: bool = True,
    engine: str = "auto",
    skipped: Skipped,
) -> list[Hits]:
    """Find the images that fit best.

    Args:
        model: as in `load_encoder`.
        images: a folder, including its subfolders; or a list of image files and Pillow images.
        queries: as in `Index.search`, like the arguments that follow.
        top: see there.
        plus: see there.
        minus: see there.
        where: see there; for an index only.
        collapse: see there.
        use_index: keep an index of a folder in the cache, so that only new images are embedded at the next search.
        engine: as in `load_encoder`.
        skipped: collects images that cannot be read.

    Returns:
        The hits of each query, the best first.

    Raises:
        ValueError: as `Index.search` does; or a condition is given, and no index can be used.
    """
    folder = Path(expand(images)) if isinstance(images, (str, Path)) else None
    can_index = use_index and folder is not None and is_utf8(str(folder)) and isinstance(model, (str, Path))
    if can_index and find_spec("lancedb") is None:
        logger.warning("every image is embedded anew at each search: an index %s", NEEDS_EXTRA)
        can_index = False
    if can_index:
        assert folder is not None
        from .index import UnwritableIndexError

        try:
            index = open_kept_index(model, folder, skipped, engine)
        except UnwritableIndexError as error:
            if where is not None:
                raise
            logger.warning("%s Until then, every image is embedded anew at each search.", error)
            skipped.items.clear()
        else:
            found = index.search(*queries, top=top, plus=plus, minus=minus, where=where, collapse=collapse)
            return [replace(hits, skipped=skipped) for hits in found]
    if where is not None:
        raise ValueError(f"The condition {where!r} can be used with an index only: search a folder, with lancedb.")
    files = expand_files(images) if folder is None else find_images(folder)
    encoder = load_encoder(model, engine)
    kept, embeds = encoder.encode_files(files, skipped)
    priors = None if encoder.bank is None else encoder.bank.prior_of_images(embeds)
    found = []
    for query in embed_queries(encoder, queries, plus, minus):
        scoring = NORMALIZED if query.is_words and priors is not None else COSINE
        hits = rank(kept, embeds, query.vector, top, priors if scoring == NORMALIZED else None, collapse)
        found.append(Hits(query.text, hits, skipped, scoring))
    return found


def open_kept_index(model: str | Path, folder: Path, skipped: Skipped | None = None, engine: str = "auto") -> Any:
    """Bring the index that is kept for a model and a folder up to date; one that can be used no more is made anew."""
    skipped = Skipped() if skipped is None else skipped
    from .index import Index, UnusableIndexError
    from .update import update_index

    name = expand(model)
    own = [engine] if engine == ONNX_INT8 else []  # its vectors are not those of the others
    place = digest(os.path.abspath(name) if Path(name).exists() else name, os.path.abspath(folder), *own)
    path = indexes_folder() / place.hex()

    def update() -> Index:
        index = (Index if is_index(path) else Index.create)(path, model, engine)
        update_index(index, [folder], skipped, wait=True)
        _ = index.encoder  # which checks the model
        about = {"description": f"index of {os.path.abspath(folder)}", "num_rows": len(index)}
        with atomic_write(path / SPACE_FILE) as file:
            file.write_text(json.dumps(about), encoding="utf-8")
        return index

    try:
        return update()
    except UnusableIndexError as error:
        logger.warning("%s It is made anew.", error)
        shutil.rmtree(path)
        skipped.items.clear()
        return update()
