"""Pushing to and loading from a Hub on loopback, with the real client."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image

from clipmini.publishing.push import prepare_push, push
from hub_repositories import Commit, File, Repository
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from stranger import run_as_stranger

WEIGHTS = "PUT /lfs/"
PUSH = [sys.executable, "-m", "clipmini.cli", "push"]


@pytest.fixture
def folder(pushable_folder):
    return pushable_folder


@pytest.fixture
def prepared(folder):
    return prepare_push(folder, "org/clipmini")


def files_at(hub, revision="main", name="org/clipmini"):
    files = hub.models[name].at(revision).files
    return {path: file.content for path, file in files.items() if path != ".gitattributes"}


def test_a_push_is_one_commit_with_all_files_and_the_same_again_is_none(hub, folder, prepared):
    pushed = push(prepared, message="First")
    assert pushed.is_new
    assert hub.models["org/clipmini"].titles() == ["First", "initial commit"]
    assert hub.models["org/clipmini"].at("main").files["model.safetensors"].is_lfs
    expected = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
    assert {path: content for path, content in files_at(hub).items() if path != "README.md"} == expected
    again = push(prepare_push(folder, "org/clipmini"))
    assert (again.is_new, again.commit.oid) == (False, pushed.commit.oid)
    (folder / "NOTICE").write_text("new")
    assert push(prepare_push(folder, "org/clipmini"), message="Second").is_new
    assert hub.models["org/clipmini"].titles() == ["Second", "First", "initial commit"]
    assert sum(request.startswith(WEIGHTS) for request in hub.requests) == 1


def test_a_revision_is_made_and_main_stays(hub, folder, prepared):
    push(prepared, message="First")
    (folder / "NOTICE").write_text("new")
    pushed = push(prepare_push(folder, "org/clipmini"), revision="v2", message="Second")
    assert (pushed.url, pushed.is_new) == (f"{hub.url}/org/clipmini/tree/v2", True)
    assert hub.models["org/clipmini"].titles("v2") == ["Second", "First", "initial commit"]
    assert "NOTICE" not in files_at(hub)
    assert not push(prepare_push(folder, "org/clipmini"), revision="v2").is_new
    api = HfApi()
    assert {ref.name for ref in api.list_repo_refs("org/clipmini").branches} == {"main", "v2"}
    assert api.list_repo_commits("org/clipmini", revision="v2")[0].title == "Second"
    api.delete_branch("org/clipmini", branch="v2")
    assert set(hub.models["org/clipmini"].branches) == {"main"}


def test_what_an_earlier_push_left_goes_in_the_same_commit_and_what_people_put_there_stays(hub, folder, prepared):
    push(prepared, message="First")
    repository = hub.models["org/clipmini"]
    gone = ["model-00001-of-00002.safetensors", "old_clipmini.py", "training_args.bin", "evaluation-a/results.json"]
    kept = ["examples/cat.jpg", "notes.txt", "LICENSE", "onnx/model.onnx"]
    more = {path: File(b"x", is_lfs=False) for path in (*gone, *kept)}
    repository.add_commit(
        "main", Commit("By hand", {**repository.at("main").files, **more}, repository.branches["main"])
    )
    expected = set(files_at(hub)) - set(gone)
    assert push(prepare_push(folder, "org/clipmini"), message="Second").is_new
    assert set(files_at(hub)) == expected
    assert expected >= set(kept)
    assert repository.titles() == ["Second", "By hand", "First", "initial commit"]
    assert not push(prepare_push(folder, "org/clipmini")).is_new


@pytest.mark.parametrize("error", [RuntimeError("xet: data processing error"), OSError("broken pipe")])
def test_an_upload_that_breaks_is_told_in_a_sentence(hub, prepared, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    with pytest.raises(ValueError, match=rf"the upload broke \({error}\); the branch is as it was, so push again"):
        push(prepared)


def test_private_is_private(hub, folder, prepared):
    push(prepared, private=True)
    assert hub.models["org/clipmini"].is_private
    push(prepare_push(folder, "org/public"))
    with pytest.raises(ValueError, match="org/public exists and is public"):
        push(prepare_push(folder, "org/public"), private=True)


def test_a_connection_that_breaks_once_does_no_harm(hub, prepared):
    hub.fail(WEIGHTS, cut_after=100_000)
    assert push(prepared).is_new
    assert sum(request.startswith(WEIGHTS) for request in hub.requests) == 2


def test_too_many_requests_are_waited_for(hub, prepared):
    hub.fail("preupload", status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    assert push(prepared).is_new
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("repos/create", 401, "log in with `hf auth login`, or set HF_TOKEN"),
        ("preupload", 403, "may not write there"),
        ("preupload", 404, "no such repository or revision"),
        ("commit", 412, "changed at the same moment"),
        ("commit", 429, "too many requests"),
        ("commit", 500, r"the Hub has a problem \(500\)"),
        (WEIGHTS, 403, "may not write there"),
    ],
)
def test_what_the_hub_refuses_is_told_and_leaves_it_as_it_was(hub, prepared, request_, status, message):
    hub.fail(request_, status=status)
    with pytest.raises(ValueError, match=message) as error:
        push(prepared, revision="v2" if request_ != "commit" else None)
    assert "\n" not in str(error.value)
    for repository in hub.models.values():
        assert repository.titles() == ["initial commit"]
        assert set(repository.branches) == {"main"}
    assert push(prepared).is_new  # and it can be repeated


def test_a_wrong_token_another_owner_and_wrong_metadata_are_refused(hub, folder, prepared):
    with pytest.raises(ValueError, match="log in with"):
        push(prepared, token="hf_wrong")
    with pytest.raises(ValueError, match="may not write there"):
        push(prepare_push(folder, "others/clipmini"))
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n# x\n")
    with pytest.raises(ValueError, match="'nonsense' is not one of the Hub's"):
        push(prepare_push(folder, "org/clipmini"))
    assert hub.models == {}


def test_no_network(hub, prepared, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(prepared)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the connection to the Hub broke"):
        push(prepared)
    assert hub.requests == []


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_the_remote_as_it_was(hub, folder, prepared):
    push(prepared, message="First")
    model = ClipMiniModel.from_pretrained(folder)
    torch.nn.init.ones_(model.visual_projection.weight)
    model.save_pretrained(folder)
    hub.hold(WEIGHTS)
    command = [*PUSH, str(folder), "org/clipmini", "--revision", "v2"]
    client = subprocess.Popen(command, env={**os.environ, **hub.environment()}, stderr=subprocess.PIPE)
    assert hub.reached.wait(300)
    client.kill()
    client.communicate()
    hub.released.set()
    assert hub.models["org/clipmini"].titles() == ["First", "initial commit"]
    assert set(hub.models["org/clipmini"].branches) == {"main"}
    push(prepare_push(folder, "org/clipmini"), revision="v2")
    assert files_at(hub, "v2")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_strangers_load_what_was_pushed_by_its_id(hub, folder, prepared, tmp_path):
    push(prepared)
    other = ClipMiniModel.from_pretrained(folder)
    torch.nn.init.ones_(other.visual_projection.weight)
    other.save_pretrained(folder)
    push(prepare_push(folder, "org/clipmini"), revision="ones")
    code = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
image = Image.linear_gradient("L").resize((200, 120)).convert("RGB")
for revision in ("main", "ones"):
    model = AutoModel.from_pretrained("org/clipmini", trust_remote_code=True, revision=revision)
    processor = AutoProcessor.from_pretrained("org/clipmini", trust_remote_code=True, revision=revision)
    with torch.no_grad():
        print(model(**processor(images=[image], text=["a"])).image_embeds.tolist())
classify = pipeline("zero-shot-image-classification", model="org/clipmini", trust_remote_code=True)
print(len(classify(image, candidate_labels=["a", "b"])))
"""
    lines = run_as_stranger(code, tmp_path, **hub.environment()).stdout.splitlines()
    image = Image.linear_gradient("L").resize((200, 120)).convert("RGB")
    inputs = ClipMiniProcessor.from_pretrained(folder)(images=[image])
    with torch.no_grad():
        expected = other.eval()(**inputs).image_embeds
    found = [torch.tensor(json.loads(line)) for line in lines[-3:-1]]
    assert torch.allclose(found[1], expected, atol=1e-5)
    assert not torch.allclose(found[0], expected, atol=1e-2)
    assert lines[-1] == "2"


@pytest.mark.slow
def test_a_data_set_is_loaded_by_its_id(hub, toy_pairs, tmp_path):
    repository = hub.datasets["org/pairs"] = Repository("org/pairs")
    files = {}
    for split, rows in (("train", range(8)), ("validation", range(8, 12))):
        content = io.BytesIO()
        toy_pairs.select(rows).remove_columns("image_id").to_parquet(content)
        files[f"data/{split}-00000-of-00001.parquet"] = File(content.getvalue(), is_lfs=True)
    repository.add_commit("main", Commit("data", files))
    code = (
        "from clipmini.data.pairs import load_pairs\n"
        "pairs = load_pairs('org/pairs')\n"
        "print({name: len(rows) for name, rows in pairs.items()}, pairs['validation'][0]['captions'])"
    )
    variables = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **hub.environment()}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'train': 8, 'validation': 4} ['a blue bar', 'bar in blue']"
