"""What is pushed and what is refused, without any network."""

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from clipmini.inference.encoders import weights_sha256
from clipmini.training.publish import address_card, prepare_push


@pytest.fixture
def folder(pushable_folder):
    """A model in a run's folder."""
    run = pushable_folder.parent
    (run / "recipe_as_run.yaml").write_text("data: {source: /home/me/photos}\n")
    (run / "curves.png").write_bytes(b"a picture")
    results = {
        "data": {"source": "/home/me/photos"},
        "skipped": [{"path": "/home/me/photos/7.png", "reason": "is empty"}],
        "duplicates": {"captions": {"num_groups": 1, "examples": [{"caption": "a dog", "image_ids": [1, 2]}]}},
        "num_skipped": 1,
    }
    (run / "results.json").write_text(json.dumps(results))
    return pushable_folder


def contents(prepared):
    return {
        file.path: file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        for file in prepared.files
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


def test_what_a_person_wrote_into_the_card_stays(folder):
    file = folder / "README.md"
    file.write_text(file.read_text().replace("## Citation", "## My own words\n\nHello.\n\n## Citation"))
    assert "## My own words\n\nHello." in contents(prepare_push(folder, "org/clipmini"))["README.md"].decode()


def test_example_pictures_become_a_widget(folder, tmp_path):
    picture = tmp_path / "my cat.png"
    Image.new("RGB", (20, 20)).save(picture)
    files = contents(prepare_push(folder, "org/clipmini", examples={picture: ["cat", "a dog"]}))
    assert files["examples/my-cat.png"] == picture.read_bytes()
    (example,) = ModelCard(files["README.md"].decode()).data["widget"]
    assert example["src"].endswith("/org/clipmini/resolve/main/examples/my-cat.png")
    assert example["candidate_labels"] == "cat, a dog"
    with pytest.raises(ValueError, match="empty label"):
        prepare_push(folder, "org/clipmini", examples={picture: ["cat", ""]})
    picture.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"my cat\.png is not an image"):
        prepare_push(folder, "org/clipmini", examples={picture: ["cat"]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training_args.bin", "training_args.bin, which may be a pickle"),
        ("optimizer.pt", "optimizer.pt, which may be a pickle"),
        (".env", r"\.env, which looks like a secret"),
        ("hf_token", "hf_token, which looks like a secret"),
        ("sub/notes.txt", "sub/notes.txt, which is no file of a model"),
        ("trainer_state.json", "trainer_state.json, which is no file of a model"),
    ],
)
def test_a_file_that_does_not_belong_there_is_refused(folder, name, message):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        prepare_push(folder, "org/clipmini")


def test_a_token_in_a_text_is_refused(folder):
    with (folder / "README.md").open("a") as file:
        file.write("login('hf_" + "abcDEF1234" * 4 + "')\n")
    with pytest.raises(ValueError, match=r"README\.md holds what looks like a token"):
        prepare_push(folder, "org/clipmini")


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path):
    (folder / "NOTICE").symlink_to(folder / "README.md")
    assert "NOTICE" in contents(prepare_push(folder, "org/clipmini"))
    (tmp_path / "elsewhere").write_text("x")
    (folder / "LICENSE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link that leads out of it, LICENSE"):
        prepare_push(folder, "org/clipmini")


def test_code_that_differs_is_refused_unless_it_may(folder):
    code = folder / "loss_clipmini.py"
    code.write_text(code.read_text() + "# mine\n")
    with pytest.raises(ValueError, match=r"\(loss_clipmini\.py\): save the model again with it, or pass --allow-code"):
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


def test_a_card_without_licence_is_refused(folder, make_card):
    make_card(None).save(folder / "README.md")
    with pytest.raises(ValueError, match=r"states no license: set data\.license in the recipe"):
        prepare_push(folder, "org/clipmini")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no model card, README\.md"):
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
        with pytest.raises(ValueError, match=r"evaluation-photos/results\.json does not say of which data it is"):
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
