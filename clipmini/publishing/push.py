"""Push a trained model to the Hub: checked first, then in one commit or not at all."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status
from PIL import ExifTags, Image

from clipmini.files import RESULTS_FILE, SAMPLES_FILE
from clipmini.html import render
from clipmini.inference.bank import load_bank
from clipmini.names import ONNX_FOLDER, check_repository, first_sentence
from modeling_clipmini.images_clipmini import ImageError, read_image

from .checks import (
    EVALUATIONS,
    EXAMPLES,
    KNOWN_FILES,
    check_weights,
    drifted_code,
    is_replaced,
    list_files,
    list_results,
    matches,
    public_results,
)

CARD = "README.md"
SPACE, SPACE_MARK = "space", "clipmini.js"  # the kind of repository, and the file by which a Space is known as ours
# The card's section on samples is a comment, `<!-- samples ... /samples -->`, until it is pushed with them.
HIDDEN_SAMPLES = re.compile(r"<!-- samples\n(.*?)/samples -->\n*", re.DOTALL)
SHOWN_SAMPLES = re.compile(r"<!-- samples -->\n.*?<!-- /samples -->\n*", re.DOTALL)
ONNX_TITLE = "## ONNX"
ONNX_SECTION = f"""

{ONNX_TITLE}

`{ONNX_FOLDER}/` has the image and the text half as graphs, with normalized embeddings as outputs: for any runtime, or
`clipmini.load("{{model_id}}", engine="onnx")`.
"""
MAIN = "main"
REMEDIES = {
    401: "the Hub needs a valid token; log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "the token may not write there; name a repository of yours, or use a token that may",
    404: "there is no such repository or revision, or the token has no access to it",
    409: "the repository was being changed at the same moment; push again",
    412: "the repository was being changed at the same moment; push again",
    429: "the Hub has had too many requests from you; wait a few minutes, and push again",
}


@dataclass(frozen=True)
class PreparedPush:
    """What a push would upload, found without any network.

    Attributes:
        repo_id: the repository on the Hub.
        files: local files, or their bytes, by path in the repository, sorted.
        left_out: the samples, which are there, but were not asked for.
        bank: how many captions and images of the training data its file holds as vectors; None if there is none.
        repo_type: "model", or "space" for the page of a model.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    left_out: Path | None = None
    bank: Mapping[str, int] | None = None
    repo_type: str = "model"

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes, by path in the repository."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


@dataclass(frozen=True, repr=False)
class Pushed:
    """A push, finished or only prepared.

    Attributes:
        repo_id: the repository on the Hub.
        sizes: the size of each file in bytes, by path in the repository.
        commit: the commit that the branch is at; None if nothing was uploaded.
        is_new: whether this push made the commit; False if the branch held all files already.
        url: the address of the branch; None if nothing was uploaded.
        left_out: the samples, which are there, but were not asked for.
        bank: as in `PreparedPush`.
        space: the push of the model's page, if one was asked for.
    """

    repo_id: str
    sizes: Mapping[str, int]
    commit: CommitInfo | None = None
    is_new: bool = False
    url: str | None = None
    left_out: Path | None = None
    bank: Mapping[str, int] | None = None
    space: "Pushed | None" = None

    def __repr__(self) -> str:
        return f"<{len(self.sizes)} files {f'at {self.url}' if self.url else f'for {self.repo_id}, not uploaded'}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the files and, if they were uploaded, the commit, ready for JSON."""
        commit = {} if self.commit is None else {"commit": self.commit.oid, "is_new": self.is_new, "url": self.url}
        files = [{"path": path, "size": size} for path, size in self.sizes.items()]
        left_out = {"left_out": str(self.left_out)} if self.left_out else {}
        bank = {"bank": dict(self.bank)} if self.bank else {}
        space = {"space": self.space.to_dict()} if self.space else {}
        return {"repo_id": self.repo_id, "files": files, **left_out, **bank, **commit, **space}

    def _repr_html_(self) -> str:
        return render(
            '<a href="{{ url }}">{{ text }}</a>' if self.url else "{{ text }}", url=self.url, text=repr(self)
        )


def prepare_push(
    folder: Path,
    repo_id: str,
    *,
    allow_code_drift: bool = False,
    examples: Sequence[tuple[Path, Sequence[str]]] = (),
    samples: bool = False,
) -> PreparedPush:
    """Check a model's folder and gather the files to push.

    Args:
        folder: the model's folder, as training saved it; figures and curves of the run are taken from beside it.
        repo_id: the repository, as owner/name; the code and the title of the pushed card will name it.
        allow_code_drift: accept a folder whose code differs from the installed package's. Whether it loads is not
            checked then.
        examples: publishable images for the Hub's widget, each with the labels to choose from.
        samples: include the picture of sample results, with images and captions of the data, and show it in the card.

    Returns:
        The files, ready to push.

    Raises:
        ValueError: the folder must not or cannot be published as it is; the message says what to do.
    """
    check_repository(repo_id)
    model_files = {path: file for path, file in list_files(folder).items() if not matches(path, [EVALUATIONS])}
    files: dict[str, Path | bytes] = {
        path: public_results(file) if file.name == RESULTS_FILE else file
        for path, file in {**list_results(folder), **model_files}.items()
    }
    drifted = drifted_code(folder)
    if drifted and not allow_code_drift:
        raise ValueError(
            f"the code in {folder} differs from the installed clipmini's ({', '.join(drifted)}): save the model again "
            "with this clipmini, or pass --allow-code-drift."
        )
    card = _load_card(folder)
    address_card(card, repo_id)
    left_out = None if samples else files.pop(SAMPLES_FILE, None)
    assert not isinstance(left_out, bytes)
    if samples and SAMPLES_FILE not in files:
        raise ValueError(f"there is no {SAMPLES_FILE} beside {folder}: training draws it if some images are held out.")
    _show_samples(card, samples)
    images = {_example_path(image): image for image, _ in examples}
    if len(images) < len(examples):
        raise ValueError("two examples have the same name in the repository; rename one of the images.")
    for image, labels in examples:
        _add_example(card, image, labels)
    files |= images
    if any(path.startswith(f"{ONNX_FOLDER}/") for path in files) and ONNX_TITLE not in card.text:
        card.text = card.text.rstrip() + ONNX_SECTION.format(model_id=repo_id)
    files[CARD] = str(card).encode()
    check_weights(folder, loads=not drifted)
    bank = load_bank(folder)  # raises if it is not of these weights
    sizes = None if bank is None else bank.sizes
    return PreparedPush(repo_id, dict(sorted(files.items())), left_out, sizes)


def _show_samples(card: ModelCard, is_wanted: bool) -> None:
    """Show the card's section on samples, or remove it."""
    if not is_wanted:
        card.text = SHOWN_SAMPLES.sub("", HIDDEN_SAMPLES.sub("", card.text))
        return
    card.text = HIDDEN_SAMPLES.sub(r"<!-- samples -->\n\1<!-- /samples -->\n\n", card.text)
    if not SHOWN_SAMPLES.search(card.text):
        raise ValueError(
            f"the card has no section to show {SAMPLES_FILE} in: write `<!-- samples -->`, the section with "
            f"`![]({SAMPLES_FILE})`, and `<!-- /samples -->`, each on lines of their own."
        )


def _example_path(image: Path) -> str:
    name = image.stem + image.suffix.lower()
    return f"{EXAMPLES}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"


def _add_example(card: ModelCard, image: Path, labels: Sequence[str]) -> None:
    """Check an example, and add it to the card's widget in place of one with the same name."""
    path = _example_path(image)
    try:
        read_image(image)
    except ImageError as error:
        raise ValueError(f"{image} {error}; name another example.") from error
    if not matches(path, KNOWN_FILES):
        raise ValueError(f"{image} cannot be an example; save it as .jpg, .jpeg, .png or .webp.")
    with Image.open(image) as opened:
        if opened.getexif().get_ifd(ExifTags.IFD.GPSInfo):
            raise ValueError(
                f"the EXIF data of {image} tell where it was taken; save it again without them, or name another "
                "example."
            )
    if not all(label.strip() for label in labels):
        raise ValueError(f"{image} has an empty label; write the example as IMAGE=LABEL,LABEL.")
    if any("," in label for label in labels):
        raise ValueError(f"{image} has a label with a comma, where the Hub's widget would split it; leave it out.")
    others = [example for example in card.data.get("widget", []) if not example.get("src", "").endswith(path)]
    example = {"src": path, "candidate_labels": ", ".join(labels), "example_title": image.stem}
    card.data["widget"] = [*others, example]


def push(
    prepared: PreparedPush,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload the prepared files in one commit.

    If anything stops the push, every branch is as it was before, and the same push can be repeated: files that are
    already uploaded are not uploaded again, and if nothing has changed, no commit is made. A repository or branch that
    was created stays, without any file of the model.

    The commit also deletes what an earlier push left on the branch and this one does not hold, such as old shards,
    code and results, and any pickles. Examples, license texts and files that no push makes stay.

    Args:
        prepared: the result of `prepare_push`.
        private: make the repository private. A public one that exists already is refused.
        revision: the branch, created if it does not exist; `main` by default.
        message: the commit message.
        token: a token with write access; by default that of the login.

    Returns:
        The commit and the address of the branch.

    Raises:
        ValueError: the Hub refused, or cannot be reached; the message says what to do.
    """
    api = HfApi(token=token, library_name="clipmini")
    repo_id, kind, branch, card = prepared.repo_id, prepared.repo_type, revision or MAIN, prepared.files[CARD]
    assert isinstance(card, bytes)
    name = f"spaces/{repo_id}" if kind == SPACE else repo_id
    with explain_refusals(name):
        validate_card(card.decode(), kind)  # before anything is made there
        make_repository(api, repo_id, private, kind)
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=kind).branches}
        start = branch if branch in heads else MAIN
        additions = [CommitOperationAdd(path, content) for path, content in prepared.files.items()]
        present = set(api.list_repo_files(repo_id, revision=start, repo_type=kind))
        if kind == SPACE and SPACE_MARK not in present and present - {CARD, ".gitattributes"}:
            raise ValueError(f"{name} exists and is no page of clipmini; rename or delete it on the Hub first.")
        leftovers = sorted(present - prepared.files.keys())
        deletions = [CommitOperationDelete(path) for path in leftovers if is_replaced(path)]
        # The slow part comes before anything that others can see: the branch, and then the commit.
        api.preupload_lfs_files(repo_id, additions, revision=start, free_memory=False, repo_type=kind)
        if branch not in heads:
            api.create_branch(repo_id, branch=branch, exist_ok=True, repo_type=kind)
        message = message or f"Upload {kind} with clipmini"
        commit = api.create_commit(
            repo_id, [*additions, *deletions], commit_message=message, revision=branch, repo_type=kind
        )
    url = f"{api.endpoint}/{name}" + ("" if branch == MAIN else f"/tree/{branch}")
    is_new = commit.oid != heads.get(branch, heads.get(MAIN))
    return Pushed(repo_id, prepared.sizes, commit, is_new, url, prepared.left_out, prepared.bank)


def make_repository(api: HfApi, name: str, private: bool | None, kind: str = "model") -> str:
    """Create a repository unless it exists.

    Args:
        api: a client with a token that may write.
        name: owner/name, or a name alone in the account of the token.
        private: make it private.
        kind: "model", or "space" for a static one.

    Returns:
        Its id, owner/name.

    Raises:
        ValueError: it should be private, but exists and is public.
    """
    sdk = "static" if kind == SPACE else None
    repo_id = api.create_repo(name, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk).repo_id
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise ValueError(f"the {kind} {repo_id} exists and is public; make it private on the Hub, or name another.")
    return repo_id


def address_card(card: ModelCard, repo_id: str) -> None:
    """Replace a card's own model id by that of the repository it goes to, in its code blocks and its title.

    Args:
        card: changed in place; text outside of code blocks stays as it is, except the title.
        repo_id: owner/name.
    """
    own_id = re.search(r'pipeline\("zero-shot-image-classification", model="([\w.-]+)/([\w.-]+)"', card.text)
    if own_id is None:
        return
    owner, old_name = map(re.escape, own_id.groups())
    name = repo_id.split("/")[1]
    card.text = re.sub(
        r"^```.*?^```",
        lambda block: re.sub(rf"(?<![\w./-]){owner}/{old_name}(?![\w./-])", repo_id, block[0]),
        card.text,
        flags=re.DOTALL | re.MULTILINE,
    )
    card.text = re.sub(rf"\A\s*# {old_name}\n", f"\n# {name}\n", card.text)
    if card.data.get("eval_results"):
        card.data["model_name"] = name


def _load_card(folder: Path) -> ModelCard:
    file = folder / CARD
    if not file.is_file():
        raise ValueError(
            f"{folder} has no model card, {CARD}: write one that begins at least with the three lines `---`, "
            "`license: ...` and `---`; `clipmini train` writes a complete one."
        )
    try:
        card = ModelCard.load(file)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"the metadata of {file} is invalid; results without a named data set, for one, are not allowed: {error}"
        ) from None
    if not card.data.get("license"):
        raise ValueError(
            f"{file} states no license: set `license` in the recipe before training, or add `license: ...` to the "
            "metadata at the top of the card."
        )
    return card


def validate_card(text: str, kind: str = "model") -> None:
    """Check a card's metadata by the rules of the Hub, which knows the licenses, for one.

    Up to version 2.1 of huggingface_hub, its own `validate` asks the public Hub, whatever `HF_ENDPOINT` names.

    Args:
        text: the card.
        kind: of its repository, "model" or "space".

    Raises:
        ValueError: the Hub refused it; the message is the Hub's.
    """
    address = f"{constants.ENDPOINT}/api/validate-yaml"
    response = get_session().post(address, json={"repoType": kind, "content": text}, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)


@contextmanager
def explain_refusals(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub and of the connection to it into one sentence that begins with the repository's name.

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
        # For a file that was not uploaded, the client raises an error that says only so; its cause says why.
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
        return f"the Hub has a problem ({status}); the branch is as it was, so push again later"
    return " ".join(str(error).split())
