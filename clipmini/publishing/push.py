"""A trained model to the Hub: checked, and then in one commit or not at all."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from PIL import ExifTags, Image

from clipmini.data.images import first_sentence
from clipmini.files import RESULTS_FILE
from modeling_clipmini.images_clipmini import find_fault

from .checks import (
    EVALUATIONS,
    EXAMPLES,
    KNOWN_FILES,
    check_weights,
    drifted_code,
    evaluation_files,
    is_replaced,
    list_files,
    matches,
    results_for_others,
    run_files,
)

CARD = "README.md"
MAIN = "main"
REMEDIES = {
    401: "the Hub asks who you are: log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "the token may not write there: name a repository of yours, or use a token that may",
    404: "there is no such repository or revision, or the token may not see it",
    409: "the repository was being changed at the same moment; push again",
    412: "the repository was being changed at the same moment; push again",
    429: "the Hub has had too many requests from you; wait some minutes, and push again",
}


@dataclass(frozen=True)
class PushedFile:
    """A file to be pushed.

    Attributes:
        path: its place in the repository.
        content: the file here, or its bytes.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class PreparedPush:
    """What a push would upload; no network was needed to say so.

    Attributes:
        repo_id: the repository on the Hub.
        files: what becomes its contents, sorted by path.
    """

    repo_id: str
    files: tuple[PushedFile, ...]


@dataclass(frozen=True)
class Pushed:
    """A push that is done.

    Attributes:
        commit: the commit that the branch is at.
        is_new: whether the push made it; not so where all was there already.
        url: where the branch is to be seen.
    """

    commit: CommitInfo
    is_new: bool
    url: str


def prepare_push(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    allow_code_drift: bool = False,
    examples: Sequence[tuple[Path, Sequence[str]]] = (),
) -> PreparedPush:
    """Check a model's folder, and gather what is to be pushed.

    Args:
        folder: the model's, as training saved it. Figures and curves that a run left beside it come along.
        repo_id: where to, as owner/name; the card's code and title will name it.
        revision: the branch that it will be pushed to; `main` by default.
        allow_code_drift: take a folder whose code is not this package's. It is not loaded then, to see whether it can
            be.
        examples: images that may be published, each with the labels to choose from, for the Hub's widget.

    Returns:
        The files.

    Raises:
        ValueError: the folder must not or cannot be published as it is; the message says what to do.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository of the Hub; name one as owner/name.")
    validate_repo_id(repo_id)
    own = {name: file for name, file in list_files(folder).items() if not matches(name, [EVALUATIONS])}
    files: dict[str, Path | bytes] = {**run_files(folder), **evaluation_files(folder), **own}
    drifted = drifted_code(folder)
    if drifted and not allow_code_drift:
        raise ValueError(
            f"the code in {folder} is not that of the installed clipmini ({', '.join(drifted)}): save the model again "
            "with it, or pass --allow-code-drift."
        )
    card = _load_card(folder)
    address_card(card, repo_id)
    for name, content in files.items():
        if Path(name).name == RESULTS_FILE and isinstance(content, Path):
            files[name] = results_for_others(content)
    images = {_example_path(image): image for image, _ in examples}
    if len(images) < len(examples):
        raise ValueError("two examples have the same name in the repository; rename one of the images.")
    for image, labels in examples:
        _check_example(image, labels)
        _show_example(card, hf_hub_url(repo_id, _example_path(image), revision=revision), image, labels)
    files |= images
    files[CARD] = str(card).encode()
    check_weights(folder, loads=not drifted)
    return PreparedPush(repo_id, tuple(PushedFile(path, files[path]) for path in sorted(files)))


def _example_path(image: Path) -> str:
    name = image.stem + image.suffix.lower()
    return f"{EXAMPLES}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"


def _check_example(image: Path, labels: Sequence[str]) -> None:
    if fault := find_fault(image):
        raise ValueError(f"{image} {fault}; name another example.")
    if not matches(_example_path(image), KNOWN_FILES):
        raise ValueError(f"{image} cannot be an example; save it as .jpg, .jpeg, .png or .webp.")
    with Image.open(image) as opened:
        if opened.getexif().get_ifd(ExifTags.IFD.GPSInfo):
            raise ValueError(
                f"{image} tells in its EXIF data where it was taken; save it again without them, or name another "
                "example."
            )
    if not all(label.strip() for label in labels):
        raise ValueError(f"{image} has an empty label; give it as IMAGE=LABEL,LABEL.")


def _show_example(card: ModelCard, url: str, image: Path, labels: Sequence[str]) -> None:
    """Put an image into what the Hub's widget offers, in the place of one of the same name."""
    path = _example_path(image)
    shown = [example for example in card.data.get("widget", []) if not example.get("src", "").endswith(path)]
    example = {"src": url, "candidate_labels": ", ".join(labels), "example_title": image.stem}
    card.data["widget"] = [*shown, example]


def push(
    prepared: PreparedPush,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload in one commit.

    Whatever stops it, every branch is as it was before, and the same push can be repeated: what has been uploaded is
    not uploaded again, and where nothing has changed no commit is made. A repository or branch that had to be made
    stays, with nothing of the model in it.

    What an earlier push left on the branch and this one does not hold, such as old shards, code and results, goes in
    the same commit, and so do pickles. Examples, license texts and files that no push makes stay.

    Args:
        prepared: what `prepare_push` gives.
        private: let only the owner see the repository. A public one that is there already is refused.
        revision: the branch, which is made where there is none; `main` by default.
        message: the commit's.
        token: one that may write; by default the one that is logged in.

    Returns:
        The commit.

    Raises:
        ValueError: the Hub refused, or cannot be reached; the message says what to do.
    """
    api = HfApi(token=token, library_name="clipmini")
    repo_id, branch = prepared.repo_id, revision or MAIN
    (readme,) = [file.content for file in prepared.files if file.path == CARD and isinstance(file.content, bytes)]
    with explain_refusals(repo_id):
        ModelCard(readme.decode()).validate()  # by the Hub's own rules
        make_repository(api, repo_id, private)
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches}
        start = branch if branch in heads else MAIN
        additions = [CommitOperationAdd(file.path, file.content) for file in prepared.files]
        left = set(api.list_repo_files(repo_id, revision=start)) - {file.path for file in prepared.files}
        removals = [CommitOperationDelete(path) for path in sorted(left) if is_replaced(path)]
        # What takes long comes before anything that shows: a branch, and then the commit.
        api.preupload_lfs_files(repo_id, additions, revision=start, free_memory=False)
        if branch not in heads:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        commit = api.create_commit(
            repo_id, [*additions, *removals], commit_message=message or "Upload model with clipmini", revision=branch
        )
    url = f"{api.endpoint}/{repo_id}" + ("" if branch == MAIN else f"/tree/{branch}")
    return Pushed(commit, commit.oid != heads.get(branch, heads.get(MAIN)), url)


def make_repository(api: HfApi, name: str, private: bool | None) -> str:
    """Make a repository unless it is there.

    Args:
        api: with a token that may write.
        name: owner/name, or a name alone, of the token's owner.
        private: let only the owner see it.

    Returns:
        Its id, owner/name.

    Raises:
        ValueError: it is there and public, and was to be private.
    """
    repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub, or name another.")
    return repo_id


def read_example(text: str) -> tuple[Path, list[str]]:
    """Read an example for the widget, as the command takes it.

    Args:
        text: "image.jpg=a cat,a dog".

    Returns:
        The image, and the labels.

    Raises:
        ValueError: it is not of that form.
    """
    image, separator, labels = text.rpartition("=")
    if not separator:
        raise ValueError(f"--example {text!r} is not of the form IMAGE=LABEL,LABEL.")
    return Path(image), [label.strip() for label in labels.split(",")]


def address_card(card: ModelCard, repo_id: str) -> None:
    """Let a card's code and title name the repository that it goes to, where they named another as its own.

    Args:
        card: changed in place. What is written outside of code is left alone, but for the title.
        repo_id: owner/name.
    """
    named = re.search(r'pipeline\("zero-shot-image-classification", model="([\w.-]+/[\w.-]+)"', card.text)
    if named is None:
        return
    old_name, name = named[1].split("/")[1], repo_id.split("/")[1]
    own_id = re.compile(rf"(?<![\w./-]){re.escape(named[1])}(?![\w./-])")
    card.text = re.sub(
        r"^```.*?^```", lambda block: own_id.sub(repo_id, block[0]), card.text, flags=re.DOTALL | re.MULTILINE
    )
    card.text = re.sub(rf"\A\s*# {re.escape(old_name)}\n", f"\n# {name}\n", card.text)
    if card.data.get("eval_results"):
        card.data["model_name"] = name


def _load_card(folder: Path) -> ModelCard:
    file = folder / CARD
    if not file.is_file():
        raise ValueError(
            f"{folder} has no model card, {CARD}: write one that at least begins with the three lines `---`, "
            "`license: ...` and `---`; `clipmini train` writes a whole one."
        )
    try:
        card = ModelCard.load(file)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"the metadata of {file} cannot be used, results without a named data set among them: {error}"
        ) from None
    if not card.data.get("license"):
        raise ValueError(
            f"{file} states no license: set `license` in the recipe before training, or write `license: ...` into "
            "the metadata at its top."
        )
    return card


@contextmanager
def explain_refusals(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the way to it raises into one sentence.

    Args:
        repo_id: what the sentence begins with.

    Raises:
        ValueError: the Hub refused, or cannot be reached.
    """
    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it.") from None
    except LocalTokenNotFoundError:
        raise ValueError(f"{repo_id}: {REMEDIES[401]}.") from None
    except (HTTPError, OSError, RuntimeError) as error:
        # Of a file that did not go up the client says only that; the cause says why.
        cause: Any = error if isinstance(error, HTTPError) else error.__cause__
        if isinstance(cause, HTTPError):
            reason = _reason(cause)
        else:
            reason = f"the upload broke ({first_sentence(error)}); the branch is as it was, so push again"
        raise ValueError(f"{repo_id}: {reason}.") from error


def _reason(error: HTTPError) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to the Hub broke ({error}); the branch is as it was, so push again"
    status = error.response.status_code
    if status in REMEDIES:
        return REMEDIES[status]
    if status >= 500:
        return f"the Hub has trouble ({status}); the branch is as it was, so push again later"
    return " ".join(str(error).split())
