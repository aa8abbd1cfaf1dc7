"""`examples/finetune.py` where neither clipmini nor its model package can be imported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmini.publishing.push import prepare_push
from stranger import run_as_stranger

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"


def test_it_is_short_and_needs_no_clipmini():
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert "import clipmini" not in source
    assert "clipmini import" not in source


@pytest.fixture
def images(toy_pairs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["file_name,caption"]
    for row in toy_pairs:
        name = f"{row['image_id']}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        lines.append(f"{name},{row['captions'][0]}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_it_trains_a_model_that_loads_and_can_be_pushed(tiny_folder, images, tmp_path):
    code = f"""
import runpy
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
from transformers import AutoModel, pipeline
model = AutoModel.from_pretrained("tuned", trust_remote_code=True)
print(model.encode_text("a red disc").shape)
classify = pipeline("zero-shot-image-classification", model="tuned", trust_remote_code=True)
print(json.dumps(classify(sys.argv[2] + "/0.png", candidate_labels=["red", "blue"])))
"""
    arguments = "--output_dir tuned --max_steps 20 --per_device_train_batch_size 6 --learning_rate 1e-3".split()
    arguments += "--logging_steps 1 --save_steps 12 --report_to none --use_cpu --license cc-by-4.0".split()
    result = run_as_stranger(code, tmp_path, tiny_folder, images, *arguments)
    assert "(16,)" in result.stdout
    assert {entry["label"] for entry in json.loads(result.stdout.splitlines()[-1])} == {"red", "blue"}
    tuned = tmp_path / "tuned"
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    assert not changed & statistics
    assert len(changed) > 0.9 * len(before.keys() - statistics)
    assert {file.name for file in tiny_folder.iterdir()} <= {file.name for file in tuned.iterdir()}
    paths = set(prepare_push(tuned, "me/tuned").files)  # as `clipmini push` does
    assert {"README.md", "config.json", "model.safetensors"} <= paths
    assert str(tmp_path) not in (tuned / "README.md").read_text()
    again = [*arguments, "--resume_from_checkpoint", "tuned/checkpoint-12"]
    resumed = run_as_stranger(code, tmp_path, tiny_folder, images, *again)
    assert resumed.stdout.count("'loss'") == 8
    losses = [json.loads(line.replace("'", '"'))["loss"] for line in result.stdout.splitlines() if "'loss'" in line]
    assert len(losses) == 20
    assert sum(map(float, losses[-5:])) < sum(map(float, losses[:5]))
