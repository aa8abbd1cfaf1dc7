"""The words that images are compared with: queries, labels and their templates, and whether a model can read them."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clipmini.names import FILE_SUFFIXES, expand, is_utf8
from clipmini.recipe_files import find_preset, preset_names

logger = logging.getLogger(__name__)

IMAGE_PREFIX = "image:"  # of a query that is the path of an image
UNREADABLE = 1 / 3  # share of unknown tokens from which on a text's meaning is lost; emoji in a sentence are fewer
FEW = 0.05  # share of such texts that is ordinary in large data, as captions of emoji alone or of a foreign name
# Pieces of words, as WordPiece writes them, that are one letter of an alphabet after Latin: Greek to kana, and not
# Chinese characters or Korean syllables, which mean something alone. English towers spell Russian or Arabic with them.
LETTERS = [f"##{chr(code)}" for code in range(0x250, 0x3100)]
TOKENIZED_AT_ONCE = 10_000  # texts: their tokens are large
SHOWN = 60  # characters of a text


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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if not (isinstance(templates, list) and templates and all(isinstance(item, str) for item in templates)):
        raise ValueError(f"{name} is not a list of templates; write one per line, each after a dash.")
    for template in templates:
        fill_template(["label"], template)
    return templates


def read_labels(given: Sequence[str]) -> list[str]:
    """Return the labels that the values of `--labels` stand for.

    Args:
        given: several labels, each as it is; or one text: the name of a file with a label a line, or labels as
            `split_labels` takes them.

    Raises:
        ValueError: there is no such file, it cannot be read, or the labels cannot be split.
    """
    if len(given) > 1:
        return list(given)
    path = expand(given[0])
    if not os.path.isfile(path):
        if path.lower().endswith(FILE_SUFFIXES):
            raise ValueError(f"The file of labels {given[0]} does not exist; name one, or give labels.")
        return split_labels(given[0])
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; write a label a line.") from error
    labels = [line.strip() for line in lines if line.strip()]
    logger.warning("read %d labels from the file %s, one a line", len(labels), path)
    return labels


def split_labels(text: str) -> list[str]:
    """Split labels at commas, except within quotation marks: `"Paris, France",fish` are two.

    Raises:
        ValueError: a quotation mark is never closed, or closed within a label.
    """
    try:
        labels = next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"The labels {text[:80]!r} cannot be split at their commas ({error}): put a label that has commas or "
            'quotation marks into quotation marks, "Paris, France", and double those within it.'
        ) from error
    return [label.strip() for label in labels] or [""]


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
    if not is_utf8(text):
        raise ValueError(f"The {kind} {text!r} is not text in UTF-8; set the terminal or the file to UTF-8.")


def describe_unreadable(tokenizer: Any, texts: Sequence[str], what: str, allowed_share: float = 0.0) -> str | None:
    """Say how many texts are in a language that a text tower does not know.

    A text counts if at least a third of its tokens, special ones aside, are unknown or are letters into which a
    tokenizer splits words of a foreign alphabet.

    Args:
        tokenizer: that of the tower. One without unknown tokens, such as byte-level BPE, is never at a loss; nor is
            None, which stands for a tokenizer that cannot be asked.
        texts: any number; a million captions take half a minute.
        what: what the texts are, in the plural.
        allowed_share: of such texts about which nothing is said, in [0, 1].

    Returns:
        Two sentences with the share, an example and the remedy; None where there is nothing to say.
    """
    if getattr(tokenizer, "unk_token_id", None) is None:
        return None
    lost = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(LETTERS)}  # it lacks most letters: unknown too
    unreadable: list[str] = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        batch = list(texts[start : start + TOKENIZED_AT_ONCE])
        tokens = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, tokens, strict=True):
            if ids and sum(token in lost for token in ids) >= UNREADABLE * len(ids):
                unreadable.append(text)
    if len(unreadable) <= allowed_share * len(texts):
        return None
    share = len(unreadable) / len(texts)
    return (
        f"the text tower cannot read {len(unreadable):,} of {len(texts):,} {what} ({share:.0%}), such as "
        f"{unreadable[0][:SHOWN]!r}: a third or more of their tokens are unknown to it, or letters of a foreign "
        "alphabet. Write in a language that it knows, or train with another: copy the model's preset, set `text` in "
        "it, such as to distilbert/distilbert-base-multilingual-cased, and name that file as `model`."
    )


def warn_of_unreadable(tokenizer: Any, texts: Sequence[str], what: str, allowed_share: float = 0.0) -> None:
    """Log what `describe_unreadable` says, if anything."""
    message = describe_unreadable(tokenizer, texts, what, allowed_share)
    if message is not None:
        logger.warning("%s", message)


def check_distinct(tokenizer: Any, labels: Sequence[str]) -> None:
    """Check that a model can tell labels apart: that no two of them are the same tokens.

    Args:
        tokenizer: that of the model; None for one that cannot be asked.
        labels: as in `fill_template`.

    Raises:
        ValueError: two labels are one text to the model, such as "Cat" and "cat" to a tokenizer that ignores case.
    """
    if tokenizer is None:
        return
    seen: dict[tuple[int, ...], str] = {}
    tokens = tokenizer(list(labels), add_special_tokens=False, verbose=False)["input_ids"]
    for label, ids in zip(labels, tokens, strict=True):
        other = seen.setdefault(tuple(ids), label)
        if other is not label:
            raise ValueError(
                f"The labels {other[:SHOWN]!r} and {label[:SHOWN]!r} are one text to the model, whose tokenizer makes "
                f"{tokenizer.decode(ids)[:SHOWN]!r} of both, and would compete with each other; leave one out, or use "
                "other words."
            )
