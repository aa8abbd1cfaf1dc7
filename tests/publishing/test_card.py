"""The card as a reader has it, and as the Hub reads it."""

import re
from importlib.metadata import requires

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from clipmini.evaluation.retrieval import METRIC_NAMES
from clipmini.inference.bank import Bank
from clipmini.publishing.folder import save_model_folder
from clipmini.recipe_files import parse_changes
from clipmini.training.recipes import load_recipe, render_recipe_card
from hub_schema import metadata_faults, metadata_of
from stranger import run_as_stranger

NO_DUPLICATES = {
    "images": {"num_groups": 0, "num_images": 0, "examples": []},
    "within": {},
    "across": {},
    "captions": {"num_groups": 0, "num_images": 0, "examples": []},
}


@pytest.fixture
def results():
    recalls = {"chance": 0.1, "before": 0.2, "after": 0.3125}
    split = {name: dict.fromkeys(METRIC_NAMES, value) for name, value in recalls.items()}
    split.update(num_images=32, num_captions=160, intervals={name: [0.25, 0.4] for name in METRIC_NAMES})
    for name in ("text_to_image_r1", "image_to_text_r1", "mean_recall"):
        split["after"][f"{name}_at_8"], split["intervals"][f"{name}_at_8"] = 0.1, [0.05, 0.2]
    return {
        "num_train_images": 1680,
        "num_train_captions": 8400,
        "num_skipped": 2,
        "duplicates": NO_DUPLICATES,
        "num_parameters": 26_800_000,
        "train_s": 150.0,
        "stages": [],
        "versions": {"python": "3.11.7", "torch": "2.15.0", "machine": "x86_64", "cpu_threads": "2"},
        "splits": {"validation": split, "test": split},
    }


def render(tiny_config, results, *overrides, recipe="demo"):
    return render_recipe_card(load_recipe(recipe, parse_changes(overrides)), tiny_config(), results)


def test_it_describes_training_and_results(results, tiny_config):
    text = render(tiny_config, results, "source=/home/me/my images").text
    assert "**Trained on:** 1,680 images from `my images`, starting from timm/" in text
    assert "| train | 1,680 | 8,400 |" in text
    assert "| heads | 40 epochs | 64 | 0.001 |" in text
    assert "of the 160 captions of the test split, **31.2%** rank their own image first among 32" in text
    assert "50 of 160 captions rank their own image first (left), the\nother 110 do not (right)." in text
    assert "of 26.8 million parameters" in text
    assert text.count("| text to image | **31.2** (25.0 to 40.0) | **31.2** (25.0 to 40.0) |") == 2
    assert text.count("32 images, 160 captions; the weights were chosen on this split") == 1
    assert "could not be read or had no caption: 2" in text
    assert "Leak check, duplicates across splits: none found" in text
    assert text.count("| 8 | 10.0 (5.0 to 20.0) | 10.0 (5.0 to 20.0) | 10.0 (5.0 to 20.0) |") == 2
    assert "in 2.5 min, not counting the time to read the images and run the frozen towers." in text
    assert "torch 2.15.0" in text
    assert "captions of COCO and Flickr30k" in text  # every figure depends on what MiniLM was trained on
    assert "before training" not in text  # random heads are nothing to compare with


def test_a_bank_and_what_it_gains_are_told(results, tiny_config):
    assert "bank" not in render(tiny_config, results).text.split("<details>")[0].lower()
    results["bank"] = {"num_captions": 10_000, "num_images": 3_000}
    for split in results["splits"].values():
        split["normalized"] = dict.fromkeys(METRIC_NAMES, 0.375)
        split["normalized_intervals"] = {name: [0.3, 0.45] for name in METRIC_NAMES}
    card = render(tiny_config, results)
    assert card.text.count("| image to text, normalized | 37.5 (30.0 to 45.0) | 37.5 (30.0 to 45.0) |") == 2
    assert "They are by cosine, except the rows" in card.text
    assert "holds, as vectors, 10,000 captions and 3,000 images of the training data" in card.text
    assert {result.metric_value for result in card.data.eval_results} == {0.3125}  # the literature's are by cosine


def test_a_time_is_told_with_what_it_counts(results, tiny_config):
    for override in ("cache_features=false", "freeze_text=false"):
        assert "threads) in 2.5 min." in render(tiny_config, results, override).text
    results["train_s"] = None  # as of a run that was cut off and went on
    assert " threads)." in render(tiny_config, results).text


def test_it_asks_for_the_versions_that_the_package_asks_for(results, tiny_config):
    (floor,) = re.findall(r'pip install "(transformers>=[\d.]+)"', render(tiny_config, results).text)
    assert floor in requires("clipmini")


def test_leaks_and_copies_are_told(results, tiny_config):
    results["duplicates"] = {**NO_DUPLICATES, "within": {"train": 3}, "across": {"train+test": 2}}
    text = render(tiny_config, results).text
    assert "(images with identical pixels): 3 in train." in text
    assert "**2 in both train and test**, which inflates the figures" in text


def test_the_stages_that_were_run_are_told(results, tiny_config):
    results["stages"] = ["heads", "both"]
    text = render(tiny_config, results, "source=mine", recipe="flickr8k").text
    assert "| heads | heads | 30 epochs | 1024 | 0.003 |" in text
    assert "| both | heads, last 4 stages of the image tower, text tower | 14 epochs | 128 | 0.0004 (" in text
    assert "chosen on this split" not in text  # the last weights were kept
    results["stages"] = ["heads"]
    assert (
        "last 4 stages"
        not in render(tiny_config, results, "source=mine", recipe="flickr8k").text.split("<details>")[0]
    )


def test_nothing_of_this_machine_is_told(results, tiny_config, tmp_path):
    paths = {
        "source": tmp_path / "images",
        "image_root": tmp_path / "images",
        "output_dir": tmp_path / "runs" / "mine",
        "file": tmp_path / "teacher.parquet",
    }
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
    teacher = f"training.teacher={{file: {paths.pop('file')}}}"
    card = render(tiny_config, results, teacher, *(f"{key}={path}" for key, path in paths.items()))
    assert str(tmp_path.parent) not in card.content
    assert "image_root: images" in card.content
    assert "file: teacher.parquet" in card.content
    assert card.text.lstrip().startswith("# mine\n")


def test_there_is_no_empty_section_and_no_trace_of_the_template(results, tiny_config):
    whole = render(tiny_config, results).content
    bare = render(tiny_config, {"splits": {}}, "model=tiny").content
    for content in (whole, bare):
        assert not re.search(r"\{\{ |\{%|None(?!\s+of this)|Undefined", content)
        assert not re.search(r"\n{4,}", content)
        assert not re.search(r"^#+ .*\n+(## |$(?!\n))", content, re.MULTILINE)  # a heading over nothing
    assert "## Results" in whole
    assert "## Results" not in bare
    assert "- **Trained on:** `offline:photos`." in bare
    assert "Sample results" not in bare
    assert "The data was not checked for duplicate images or for leaks between splits." in bare
    assert "were not searched for.\n- Captions" in whole


def test_the_hub_takes_its_metadata(results, tiny_config):
    card = render(tiny_config, results)
    assert metadata_faults(card.content) == []
    data = metadata_of(card.content)
    assert data["base_model"] == ["timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "zero-shot-image-classification")
    assert data["license"] == "apache-2.0"
    assert "datasets" not in data  # a folder here is none of the Hub's
    (index,) = data["model-index"]
    assert index["name"] == "demo"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "offline:photos", "type": "local", "split": "test"}
    assert result["metrics"][0]["value"] == 0.3125
    assert result["metrics"][0]["args"] == {"interval_95": [0.25, 0.4]}
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_the_license_is_the_one_that_the_recipe_states(results, tiny_config, tmp_path):
    card = render(tiny_config, results, "license=CC-BY-NC-4.0")
    assert card.data.license == "cc-by-nc-4.0"
    assert "The author states `cc-by-nc-4.0` as the license of this model. Whether" in card.text
    assert "| image tower | timm/tf_efficientnet_lite0.in1k | apache-2.0 |" in card.text
    assert "| training data | offline:photos | cc0-1.0 |" in card.text  # by the README.md among them
    card = render(tiny_config, results, "license=null", f"source={tmp_path}")
    assert f"| training data | {tmp_path.name} | not stated |" in card.text
    assert card.data.license is None
    assert "No license is stated for this model. Whether" in card.text


def test_data_and_towers_of_the_hub_are_named_by_id(results, tiny_config):
    card = render(tiny_config, results, "model=resnet50-distilbert", "source=org/pairs")
    assert card.data.base_model == ["timm/resnet50.a1_in1k", "distilbert/distilbert-base-uncased"]
    assert card.data.datasets == ["org/pairs"]
    assert card.data.eval_results[0].dataset_type == "org/pairs"
    assert metadata_faults(card.content) == []


def test_a_second_image_tower_is_named_between_the_others(results, tiny_config):
    card = render(tiny_config, results, "model=lite0-lite2-minilm")
    assert (
        "starting from timm/tf_efficientnet_lite0.in1k (image tower), timm/tf_efficientnet_lite2.in1k (second image "
        "tower) and sentence-transformers/all-MiniLM-L6-v2 (text tower)."
    ) in card.text
    assert "| second image tower | timm/tf_efficientnet_lite2.in1k | apache-2.0 |" in card.text
    assert len(card.data.base_model) == 3


def test_a_model_that_was_trained_further_keeps_its_origin(results, tiny_config, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    render(tiny_config, results, "license=cc-by-sa-4.0").save(first / "README.md")
    card = render(tiny_config, results, f"model={first}", "license=mit")
    assert card.data.base_model == ["timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"]
    assert card.data.license == "mit"
    assert "| starting model | first | cc-by-sa-4.0 |" in card.text
    assert "| text to image, before training | 20.0 |" in card.text


def test_a_name_that_is_no_id_becomes_one(results, tiny_config, tmp_path):
    card = render(tiny_config, results, f'output_dir={tmp_path}/my "best" run')
    assert '"your-name/my-best-run"' in card.text


def python_blocks(card, folder):
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert all("your-name/demo" in block for block in blocks)
    return [block.replace("your-name/demo", str(folder)) for block in blocks]


def test_every_python_block_runs_where_clipmini_is_not_installed(
    tiny_model, tiny_processor, results, tiny_config, tmp_path
):
    folder, vectors = tmp_path / "model", torch.eye(3, 16).half()
    save_model_folder(tiny_model, folder, bank=Bank(vectors, vectors, 14.0))  # which other libraries pass over
    Image.linear_gradient("L").resize((200, 120)).convert("RGB").save(tmp_path / "image.jpg")
    blocks = python_blocks(render(tiny_config, results), folder)
    assert len(blocks) == 4
    code = f"for block in {blocks!r}:\n    exec(compile(block, '<card>', 'exec'), {{}})\n"
    output = run_as_stranger(code, tmp_path).stdout
    assert "'score'" in output
    assert "torch.Size([2, 16])" in output
