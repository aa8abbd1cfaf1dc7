"""`clipmini push` as a user meets it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from clipmini import cli
from clipmini.inference.bank import Bank, save_bank


@pytest.fixture
def run(pushable_folder):
    """Push the tiny model with some options, in this process."""

    def invoke(*options, to="org/clipmini"):
        return CliRunner().invoke(cli.app, ["push", str(pushable_folder), to, *options], prog_name="clipmini")

    return invoke


def test_a_dry_run_lists_files_and_sizes_without_the_network(run, hub, pushable_folder):
    result = run("--dry-run", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    sizes = {file["path"]: file["size"] for file in answer["files"]}
    assert sizes["model.safetensors"] == (pushable_folder / "model.safetensors").stat().st_size
    assert set(answer) == {"repo_id", "files"}
    table = run("--dry-run").stdout
    assert f"{sizes['model.safetensors']:,}" in table
    assert "Nothing was uploaded" in table
    assert hub.requests == []


def test_a_bank_is_named_with_what_it_holds(run, pushable_folder):
    vectors = torch.eye(3, 16).half()
    save_bank(Bank(vectors, vectors[:2], 14.0), pushable_folder)
    assert "holds vectors of 3 captions and 2 images of the training data" in run("--dry-run").stdout
    answer = json.loads(run("--dry-run", "--json").stdout)
    assert answer["bank"] == {"num_captions": 3, "num_images": 2}
    assert "bank.safetensors" in [file["path"] for file in answer["files"]]


def test_the_bank_of_other_weights_is_refused(run, pushable_folder, tiny_model):
    vectors = torch.eye(3, 16).half()
    save_bank(Bank(vectors, vectors, 14.0), pushable_folder)
    with torch.no_grad():
        next(tiny_model.parameters()).add_(1)
    tiny_model.save_pretrained(pushable_folder)
    result = run("--dry-run")
    assert result.exit_code == 2
    assert "is of other weights than those beside it" in result.stderr


def test_samples_that_stay_behind_are_told(run, pushable_folder):
    (pushable_folder.parent / "recipe_as_run.yaml").write_text("")
    (pushable_folder.parent / "samples.jpg").write_bytes(b"an image")
    told = [line for line in run("--dry-run").stdout.splitlines() if "samples" in line]
    samples = pushable_folder.parent / "samples.jpg"
    assert told == [f"Left out: {samples.name}, an image of sample results; --samples shows it in the card."]
    assert json.loads(run("--dry-run", "--json").stdout)["left_out"] == str(samples)


def test_push_then_push_again(run, hub):
    answer = json.loads(run("--json", "--private", "--message", "Mine").stdout)
    assert (answer["is_new"], answer["url"]) == (True, f"{hub.url}/org/clipmini")
    assert answer["commit"] == hub.models["org/clipmini"].at("main").sha
    assert hub.models["org/clipmini"].titles()[0] == "Mine"
    assert "already has all of it" in run().stdout
    assert f"{hub.url}/org/clipmini/tree/v2" in run("--revision", "v2").stdout


@pytest.mark.parametrize(
    ("options", "to", "words"),
    [
        ([], "clipmini", "name one as owner/name"),
        ([], "others/clipmini", "may not write there"),
        (["--example", "cat.jpg"], "org/clipmini", "not of the form IMAGE=LABEL,LABEL"),
        (["--example", "cat.jpg=a", "--example", "cat.jpg=b"], "org/clipmini", "have the same name"),
        (["--example", "cat.jpg=a,b"], "org/clipmini", "cat.jpg"),
    ],
)
def test_refusals_are_one_sentence(run, hub, options, to, words):
    result = run(*options, to=to)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert hub.models == {}
