"""The words that images are compared with: queries, labels and their templates, checked before anything slow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clipmini.data.recipe_files import find_preset, preset_names

IMAGE_PREFIX = "image:"  # of a query that is the path of an image


def is_image(term: Any) -> bool:
    """Return whether a term of a query is an image, given by its path or itself, and not words."""
    return not isinstance(term, str) or term.startswith(IMAGE_PREFIX)


def check_queries(terms: Sequence[Any], top: int) -> None:
    """Check what is searched for.

    Args:
        terms: words, `image:` and a path, or Pillow images.
        top: the number of images wanted.

    Raises:
        ValueError: there is no term, one is blank, not UTF-8, or names no image, or `top` is below 1.
    """
    if not terms:
        raise ValueError("There is no query; say in words what the image should show, or name one as image:PATH.")
    for term in terms:
        if isinstance(term, str):
            check_text("query", term)
            if not term.removeprefix(IMAGE_PREFIX).strip():
                raise ValueError("The query is empty; say in words what the image should show.")
        elif not hasattr(term, "getexif"):  # of a Pillow image
            raise ValueError(f"The query {term!r} is not a text; give words, or a Pillow image.")
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top={top} is not allowed; ask for at least 1 image.")


def load_templates(name: str) -> list[str]:
    """Load a list of templates.

    Args:
        name: a single template, which contains `{}`; the name of a list in the package; or a YAML file with a list.

    Raises:
        ValueError: there is no such list or file, or it is not a list of templates.
    """
    if "{}" in name:
        return [name]
    shipped = preset_names("templates")
    file = find_preset("templates", name) if name in shipped else Path(name).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{name!r} is not a template; write one with {{}} where the label goes, or name a YAML file or one of "
            f"{', '.join(shipped)}."
        )
    try:
        templates = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if not (isinstance(templates, list) and templates and all(isinstance(item, str) for item in templates)):
        raise ValueError(f"{name} is not a list of templates; write one per line, each after a dash.")
    for template in templates:
        fill_template(["label"], template)
    return templates


def fill_template(labels: Sequence[str], template: str) -> list[str]:
    """Make a caption of each label.

    Args:
        labels: at least one, none blank, no two the same, in UTF-8.
        template: contains `{}` where the label goes; other braces stay as they are. In UTF-8.

    Raises:
        ValueError: a label or the template is not allowed.
    """
    check_text("template", template)
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no {{}} where the label goes; try 'a photo of {{}}'.")
    if isinstance(labels, str) or not labels:
        raise ValueError(f"The labels {labels!r} are not allowed; give a list of at least one label.")
    for number, label in enumerate(labels, start=1):
        check_text("label", label)
        if not label.strip():
            raise ValueError(f"Label {number} of {len(labels)} is blank; leave it out or fill it in.")
    if len(set(labels)) < len(labels):
        repeated = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"The label {repeated!r} is given twice and would compete with itself; leave one out.")
    return [template.replace("{}", label) for label in labels]


def check_text(kind: str, text: str) -> None:
    """Check that a text can be tokenized: that it holds no surrogates, which stand for bytes that are not UTF-8.

    Raises:
        ValueError: it cannot be encoded in UTF-8; the message calls it a `kind`, such as "query".
    """
    if not isinstance(text, str):
        raise ValueError(f"The {kind} {text!r} is not a text; give words.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {kind} {text!r} is not text in UTF-8; set the terminal or the file to UTF-8.") from None
