"""What is pushed and what is refused, without any network."""

import json
import os
import re

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from clipmini.evaluation.retrieval import METRIC_NAMES
from clipmini.files import weights_sha256
from clipmini.publishing.push import address_card, prepare_push
from modeling_clipmini import ClipMiniTextModel, ClipMiniVisionModel


@pytest.fixture
def folder(pushable_folder):
    """A model in a run's folder."""
    run = pushable_folder.parent
    (run / "recipe_as_run.yaml").write_text("data: {source: /home/me/photos}\n")
    (run / "curves.png").write_bytes(b"an image")
    results = {
        "data": {"source": "/home/me/photos"},
        "skipped": [{"path": "/home/me/photos/7.png", "reason": "is empty"}],
        "duplicates": {"captions": {"num_groups": 1, "examples": [{"caption": "a dog", "image_ids": [1, 2]}]}},
        "num_skipped": 1,
        "command": "clipmini evaluate /home/me/model /home/me/photos",
        "per_class": {"command": 0.5},
    }
    (run / "results.json").write_text(json.dumps(results))
    return pushable_folder


def contents(prepared):
    return {
        path: content if isinstance(content, bytes) else content.read_bytes()
        for path, content in prepared.files.items()
    }


def test_what_is_pushed(folder, tiny_folder):
    files = contents(prepare_push(folder, "org/clipmini"))
    assert set(files) == {*os.listdir(tiny_folder), "README.md", "results.json", "curves.png"}
    for name in os.listdir(tiny_folder):
        assert files[name] == (folder / name).read_bytes()
    assert json.loads(files["results.json"]) == {
        "data": {"source": "photos"},
        "duplicates": {"captions": {"num_groups": 1}},
        "num_skipped": 1,
        "per_class": {"command": 0.5},  # a class of this name
    }
    assert all(b"/home/me" not in content for content in files.values())


def test_the_card_names_the_repository(folder):
    assert "your-name/tiny" in (folder / "README.md").read_text()
    pushed = contents(prepare_push(folder, "org/clipmini"))["README.md"].decode()
    assert "your-name" not in pushed
    assert 'AutoModel.from_pretrained("org/clipmini", trust_remote_code=True)' in pushed
    assert "clipmini serve org/clipmini" in pushed
    assert "\n# clipmini\n" in pushed
    again = ModelCard(pushed)
    address_card(again, "org/other")  # a card that has been pushed before
    assert "org/clipmini" not in again.text
    assert "\n# other\n" in again.text


def test_samples_are_pushed_only_on_request(folder, make_card):
    split = {name: dict.fromkeys(METRIC_NAMES, 0.5) for name in ("chance", "after")}
    split |= {"num_images": 8, "num_captions": 8, "intervals": dict.fromkeys(METRIC_NAMES, (0.4, 0.6))}
    make_card(results={"splits": {"test": split}}).save(folder / "README.md")
    samples = folder.parent / "samples.jpg"
    with pytest.raises(ValueError, match=r"there is no samples\.jpg beside"):
        prepare_push(folder, "org/clipmini", samples=True)
    samples.write_bytes(b"an image")
    without = prepare_push(folder, "org/clipmini")
    assert without.left_out == samples
    assert "samples.jpg" not in without.files
    assert b"Sample results" not in without.files["README.md"]
    assert b"<!--" not in without.files["README.md"]
    shown = prepare_push(folder, "org/clipmini", samples=True)
    assert shown.left_out is None
    assert shown.files["samples.jpg"] == samples
    text = shown.files["README.md"].decode()
    assert re.search(
        r"<!-- samples -->\n## Sample results\n\n!\[.+\]\(samples.jpg\)\n\n(?s:.+)\n<!-- /samples -->", text
    )
    # As after a download of what was pushed: they stay only if they are asked for again.
    (folder / "README.md").write_text(text)
    samples.rename(folder / "samples.jpg")
    assert prepare_push(folder, "org/clipmini", samples=True).files["README.md"].decode() == text
    without = prepare_push(folder, "org/clipmini")
    assert "samples.jpg" not in without.files
    assert b"Sample results" not in without.files["README.md"]
    assert b"<!--" not in without.files["README.md"]


def test_a_card_without_a_place_for_samples_is_named(folder):
    (folder.parent / "samples.jpg").write_bytes(b"an image")
    with pytest.raises(ValueError, match="the card has no section to show samples"):
        prepare_push(folder, "org/clipmini", samples=True)


def test_a_card_names_others_as_it_did(make_card):
    card = make_card()
    address_card(card, "acme/shoes")
    others = (
        '\nBetter than `AutoModel.from_pretrained("openai/clip-vit-base-patch32")` and than acme/shoes of last year.\n'
        '\n```python\nload_dataset("acme/shoes-pairs"), load("acme/shoes")\n```\n'
    )
    card.text = others + card.text
    address_card(card, "acme/boots")
    assert card.text.startswith(others.replace('load("acme/shoes")', 'load("acme/boots")'))
    assert 'from_pretrained("acme/shoes"' not in card.text
    assert "clipmini serve acme/boots" in card.text


def test_what_a_person_wrote_into_the_card_stays(folder):
    file = folder / "README.md"
    file.write_text(file.read_text().replace("## Citation", "## My own words\n\nHello.\n\n## Citation"))
    assert "## My own words\n\nHello." in contents(prepare_push(folder, "org/clipmini"))["README.md"].decode()


def test_example_images_become_a_widget(folder, tmp_path):
    image = tmp_path / "my cat.PNG"
    Image.new("RGB", (20, 20)).save(image)
    examples = [(image, ["cat", "a dog"])]
    files = contents(prepare_push(folder, "org/clipmini", examples=examples))
    assert files["examples/my-cat.png"] == image.read_bytes()
    (example,) = ModelCard(files["README.md"].decode()).data["widget"]
    assert example["src"] == "examples/my-cat.png"
    assert example["candidate_labels"] == "cat, a dog"
    with pytest.raises(ValueError, match="same name in the repository"):
        prepare_push(folder, "org/clipmini", examples=[*examples, (tmp_path / "other" / "my cat.png", ["cat"])])
    with pytest.raises(ValueError, match="a label with a comma, where the Hub's widget would split it"):
        prepare_push(folder, "org/clipmini", examples=[(image, ["cat", "Paris, France"])])
    with pytest.raises(ValueError, match="empty label"):
        prepare_push(folder, "org/clipmini", examples=[(image, ["cat", ""])])
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"my cat\.PNG is not an image"):
        prepare_push(folder, "org/clipmini", examples=examples)


def test_an_example_that_the_hub_cannot_show_or_that_tells_a_place_is_refused(folder, tmp_path):
    image, exif = Image.new("RGB", (20, 20)), Image.Exif()
    image.save(tmp_path / "cat.gif")
    with pytest.raises(ValueError, match=r"cat\.gif cannot be an example; save it as \.jpg, \.jpeg, \.png or \.webp"):
        prepare_push(folder, "org/clipmini", examples=[(tmp_path / "cat.gif", ["cat"])])
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitude: (52.0, 31.0, 0.0)}
    image.save(tmp_path / "cat.jpg", exif=exif)
    with pytest.raises(ValueError, match="where it was taken; save it again without"):
        prepare_push(folder, "org/clipmini", examples=[(tmp_path / "cat.jpg", ["cat"])])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "optimizer.pt, which may be a pickle"),
        (".env", r"\.env, which looks like a secret"),
        ("hf_token", "hf_token, which looks like a secret"),
        ("sub/notes.txt", "files that do not belong to a model: sub/notes.txt; remove them"),
        ("trainer_state.json", "files that do not belong to a model: trainer_state.json; remove them"),
        ("LICENSES-draft/client-list.xlsx", "do not belong to a model: LICENSES-draft/client-list.xlsx"),
        ("old/modeling_clipmini.py", "do not belong to a model: old/modeling_clipmini.py"),
    ],
)
def test_a_file_that_does_not_belong_there_is_refused(folder, name, message):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        prepare_push(folder, "org/clipmini")


def test_all_files_that_are_not_known_are_named_at_once(folder):
    for name in ("a.txt", "b.xlsx"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"do not belong to a model: a\.txt, b\.xlsx; remove them"):
        prepare_push(folder, "org/clipmini")


def test_what_tools_and_runs_leave_is_passed_over(folder):
    expected = contents(prepare_push(folder, "org/clipmini")).keys()
    for name in (".git/config", ".cache/huggingface/x.lock", ".DS_Store", "runs/events.1", "training_args.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_text("x")
    assert contents(prepare_push(folder, "org/clipmini")).keys() == expected


def test_a_snapshot_of_the_hubs_cache_can_be_pushed(folder):
    expected = contents(prepare_push(folder, "org/clipmini"))
    snapshot, blobs = (
        folder.parent / "models--org--x" / "snapshots" / ("a" * 40),
        folder.parent / "models--org--x/blobs",
    )
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(file.rename(blobs / str(number)))
    found = contents(prepare_push(snapshot, "org/clipmini"))
    assert found == {name: content for name, content in expected.items() if name not in ("results.json", "curves.png")}


@pytest.mark.parametrize("tower", [ClipMiniVisionModel, ClipMiniTextModel])
def test_a_single_tower_can_be_pushed(folder, tower):
    tower.from_pretrained(folder).save_pretrained(folder)
    assert "model.safetensors" in contents(prepare_push(folder, "org/tower"))
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "projection" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        prepare_push(folder, "org/tower")


def test_a_token_in_a_text_is_refused(folder):
    with (folder / "README.md").open("a") as file:
        file.write("login('hf_" + "abcDEF1234" * 4 + "')\n")
    with pytest.raises(ValueError, match=r"README\.md holds what looks like a Hub token"):
        prepare_push(folder, "org/clipmini")


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path):
    (folder / "NOTICE").symlink_to(folder / "README.md")
    assert "NOTICE" in contents(prepare_push(folder, "org/clipmini"))
    (tmp_path / "elsewhere").write_text("x")
    (folder / "LICENSE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link to a file outside of it, LICENSE"):
        prepare_push(folder, "org/clipmini")


def test_code_that_differs_is_refused_unless_it_may(folder):
    code = folder / "loss_clipmini.py"
    code.write_text(code.read_text() + "# mine\n")
    with pytest.raises(ValueError, match=r"\(loss_clipmini\.py\): save the model again .* or pass --allow-code"):
        prepare_push(folder, "org/clipmini")
    assert contents(prepare_push(folder, "org/clipmini", allow_code_drift=True))["loss_clipmini.py"].endswith(
        b"# mine\n"
    )
    code.unlink()
    with pytest.raises(ValueError, match=r"loss_clipmini\.py"):
        prepare_push(folder, "org/clipmini")


@pytest.mark.parametrize("damage", ["missing", "truncated", "not finite", "lacking"])
def test_broken_weights_are_refused(folder, damage):
    file = folder / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "not finite":
        save_file({**weights, "logit_scale": torch.tensor(float("nan"))}, file, metadata={"format": "pt"})
    else:
        del weights["visual_projection.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    words = {"missing": "has no weights", "truncated": "is damaged", "lacking": "lacks weights"}
    with pytest.raises(ValueError, match=words.get(damage, r"not finite \(logit_scale\)")):
        prepare_push(folder, "org/clipmini")


def test_a_card_without_license_is_refused(folder, make_card):
    make_card(None).save(folder / "README.md")
    with pytest.raises(ValueError, match=r"states no license: set `license` in the recipe"):
        prepare_push(folder, "org/clipmini")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no model card, README\.md: write one that begins at least with"):
        prepare_push(folder, "org/clipmini")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    prepare_push(folder, "org/clipmini")


@pytest.fixture
def evaluate(folder):
    """Leave results beside the model."""

    def write(name, model, **facts):
        file = folder.parent / name / "results.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"model": model, "data": {"source": "a/b.csv"}, **facts}))
        return file

    return write


def test_results_without_data_are_refused(folder, evaluate):
    own = {"weights_sha256": weights_sha256(folder)}
    evaluation = evaluate("evaluation-photos", own)
    assert "evaluation-photos/results.json" in contents(prepare_push(folder, "org/clipmini"))
    for bad in (None, {"source": ""}):
        evaluate("evaluation-photos", own, data=bad)
        with pytest.raises(ValueError, match=r"evaluation-photos/results\.json does not say what data"):
            prepare_push(folder, "org/clipmini")
    evaluation.unlink()
    file = folder / "README.md"
    index = "model-index:\n- name: x\n  results:\n  - task: {type: t}\n    metrics: [{type: r, value: 1}]\n"
    file.write_text(file.read_text().replace("library_name:", f"{index}library_name:", 1))
    with pytest.raises(ValueError, match="results without a named data set"):
        prepare_push(folder, "org/clipmini")


def test_figures_of_other_weights_stay_behind(folder, evaluate, caplog):
    evaluate("evaluation-own", {"weights_sha256": weights_sha256(folder)})
    evaluate("evaluation-other", {"weights_sha256": "0" * 64})
    evaluate("evaluation-old", {"name": "run"})
    evaluate("evaluation-broken", {}).write_text("{")
    evaluation = folder / "evaluation-inside" / "results.json"  # as in a repository that was downloaded
    evaluation.parent.mkdir()
    evaluation.write_text('{"model": {"weights_sha256": "0"}, "data": {"source": "org/pairs"}}')
    files = contents(prepare_push(folder, "org/clipmini"))
    assert [name for name in files if "evaluation" in name] == ["evaluation-own/results.json"]
    assert caplog.text.count("is left out: it does not say that it is of these weights") == 4
    other = folder.rename(folder.with_name("other"))
    assert {"results.json", "curves.png"}.isdisjoint(contents(prepare_push(other, "org/clipmini")))


@pytest.mark.parametrize("name", ["clipmini", "a/b/c", "org/", "org/a b", "org/-x"])
def test_a_name_that_is_no_repository_is_refused(folder, name):
    with pytest.raises(ValueError, match=r"owner/name|repo|Repo"):
        prepare_push(folder, name)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        prepare_push(tmp_path, "org/clipmini")
