"""Show results as HTML, in a notebook or a report: everything is escaped, and images are inside of it."""

import base64
import io
from typing import Any

import jinja2
from markupsafe import Markup

from modeling_clipmini.images_clipmini import ImageError, read_image

THUMBNAIL = (256, 192)  # twice the size shown, for screens of high resolution
QUALITY = 80
# Colors are those of the notebook, light or dark.
BOX = "width:128px;height:96px;border-radius:6px;background:rgba(128,128,128,.15)"
PICTURE = '<img src="{}" alt="{}" style="' + BOX + ';object-fit:contain;display:block">'
NO_PICTURE = '<div style="' + BOX + ';display:grid;place-items:center">gone or broken</div>'


def thumbnail_uri(image: Any) -> str | None:
    """Return what `read_image` takes as a small JPEG in a data URI, or None if the image is gone or broken."""
    try:
        thumbnail = read_image(image)
    except ImageError:
        return None
    thumbnail.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(template: str, **values: Any) -> str:
    """Fill in a Jinja template, in which all values are escaped.

    In it, `picture(image)` shows an image, and `thumbnail(image)` is the address of a small one.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals |= {"picture": _picture, "thumbnail": thumbnail_uri}
    return environment.from_string(template).render(**values)


def _picture(image: Any) -> Markup:
    uri = thumbnail_uri(image)
    return Markup(NO_PICTURE) if uri is None else Markup(PICTURE).format(uri, getattr(image, "name", ""))
