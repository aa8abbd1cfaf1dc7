import inspect
from dataclasses import replace
from pathlib import Path

import pytest

from clipmini.data.pairs import DataArguments
from clipmini.recipe_files import (
    TOWERS,
    field_names,
    parse_changes,
    preset_names,
    read_data_section,
    section_keys,
)
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import ModelPreset, build_model
from clipmini.training.lora import Lora
from clipmini.training.objective import HardNegatives
from clipmini.training.recipes import load_recipe
from modeling_clipmini import ClipMiniConfig

TINY_TEXT = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
TINY = ModelPreset(vision="resnet18", text=TINY_TEXT, pretrained=False)


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


GOOD = """
model: tiny
data:
  source: photos
  validation_fraction: 0.2
training:
  output_dir: out
  learning_rate: 5e-5   # text to YAML 1.1
  weight_decay: 0
  warmup_steps: 10
  bf16: false
  text_learning_rate: null
"""


def test_values_arrive_with_their_types(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.training.learning_rate == 5e-5
    assert recipe.training.weight_decay == 0.0
    assert recipe.training.text_learning_rate is None
    assert recipe.data.validation_fraction == 0.2
    assert isinstance(recipe.model, ModelPreset)
    assert recipe.model.vision == "test_resnet"


@pytest.mark.parametrize(
    ("overrides", "read", "expected"),
    [
        (["training.learning_rate=1e-3"], lambda r: r.training.learning_rate, 1e-3),
        (["learning_rate=0.5"], lambda r: r.training.learning_rate, 0.5),
        (["source=other folder"], lambda r: r.data.source, "other folder"),
        (["source=Photos #1"], lambda r: r.data.source, "Photos #1"),
        (["source=2024 #1"], lambda r: r.data.source, "2024 #1"),
        (["source=#1"], lambda r: r.data.source, "#1"),
        (['source="Photos #1"'], lambda r: r.data.source, "Photos #1"),
        (["projection=mlp"], lambda r: r.values["model_config"], {"projection": "mlp"}),
        (["model_config.loss=sigmoid"], lambda r: r.values["model_config"], {"loss": "sigmoid"}),
        (["model=org/name"], lambda r: r.model, "org/name"),
        (["freeze_vision=true", "num_train_epochs=3"], lambda r: r.training.num_train_epochs, 3),
        (["eval_strategy=no"], lambda r: r.training.eval_strategy.value, "no"),
        (["source=2024"], lambda r: r.data.source, "2024"),
        (["source=2024-01-02"], lambda r: r.data.source, "2024-01-02"),
        (["source=2024-13-02"], lambda r: r.data.source, "2024-13-02"),
        (["lr_scheduler_type=cosine"], lambda r: r.training.lr_scheduler_type.value, "cosine"),
    ],
)
def test_overrides(overrides, read, expected, tmp_path):
    assert read(load_recipe(write(tmp_path, GOOD), parse_changes(overrides))) == expected


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD, ["learning_rat=1"], "there is no 'learning_rat'; the nearest name is 'learning_rate'"),
        (GOOD, ["training.freeze_visoin=true"], "training: there is no 'freeze_visoin'; .* 'freeze_vision'"),
        (GOOD, ["trainig.seed=1"], "there is no 'trainig'; the nearest name is 'training'"),
        (GOOD, ["a.b.c=1"], "there is no 'a'"),
        (GOOD, ["learning_rate"], "not of the form key=value"),
        (GOOD, ["learning_rate=fast"], "training.learning_rate='fast' is not allowed; use a number"),
        (GOOD, ["num_train_epochs=true"], "training.num_train_epochs=True is not allowed"),
        (GOOD, ["warmup_steps=[1, 2]"], "training.warmup_steps"),
        (GOOD, ["seed=1.5"], "training.seed=1.5 is not allowed; use a whole number"),
        (GOOD, ["freeze_text=1"], "training.freeze_text=1 is not allowed; use true or false"),
        (GOOD, ["source=null"], "data.source=None is not allowed; use text"),
        (GOOD, ["source=no"], "data.source=False is not allowed; use text"),
        (GOOD, ["output_dir="], "training.output_dir is empty; set it to a folder"),
        (
            GOOD,
            ["metric_for_best_model=eval_loss"],
            "metric_for_best_model='eval_loss' is not allowed; use one of",
        ),
        (GOOD, ["per_device_eval_batch_size=0"], "per_device_eval_batch_size=0 is not allowed; use at least 1"),
        (GOOD, ["gradient_accumulation_steps=0"], "gradient_accumulation_steps=0"),
        (GOOD, ["num_train_epochs=-1"], "num_train_epochs=-1 is not allowed"),
        (GOOD, ["remove_unused_columns=true"], "remove_unused_columns=True would remove"),
        (GOOD, ["save_only_model=true"], "save_only_model=True would leave checkpoints that no run can resume from"),
        (GOOD, ["label_smoothing_factor=1"], "label_smoothing_factor=1 is not allowed; use 0 or more, below 1"),
        (GOOD, ["lora={parts: audio}"], r"lora\.parts='audio' is not allowed; use vision, text or \[vision, text\]"),
        (GOOD, ["model=tinny"], r"model='tinny' is neither a preset \(.*tiny.*\)"),
        (GOOD, ["lr_scheduler_type=cosin"], "cosin"),
        (GOOD.replace("data:", "dta:"), [], "there is no 'dta'; the nearest name is 'data'"),
        (
            GOOD.replace("  source: photos\n", ""),
            [],
            r"data\.source is missing: .* names no data\. Add --set source=FOLDER",
        ),
        (GOOD.replace("model: tiny", ""), [], "model=None"),
        (GOOD, ["keep=7"], "keep=7 is not allowed; use a folder, a table, a Hub id or a recipe"),
        ("model: tiny\ndata: photos\n", [], "data must hold `key: value` lines"),
        ("- a\n- b\n", [], "must hold `key: value` lines, not list"),
        ("model: [tiny\n", [], "is not YAML"),
    ],
)
def test_what_is_wrong_is_said(text, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), parse_changes(overrides))


@pytest.mark.parametrize(("section", "cls"), [("data", DataArguments), ("training", ClipMiniTrainingArguments)])
def test_the_keys_read_from_source_are_the_fields_of_the_class(section, cls):
    assert sorted(section_keys(section)) == sorted(field_names(cls))


def test_the_keys_of_the_config_are_its_arguments():
    names = inspect.signature(ClipMiniConfig.__init__).parameters
    assert section_keys("model_config") == [name for name in names if name not in ("self", "kwargs", *TOWERS)]


def test_a_mapping_for_a_section_changes_the_keys_in_it(tmp_path):
    changes = {"data": {"source": tmp_path}, "training": {"seed": 3}, "model_config": {"loss": "sigmoid"}}
    recipe = load_recipe(write(tmp_path, GOOD), changes)
    assert (recipe.data.source, recipe.data.validation_fraction) == (str(tmp_path), 0.2)
    assert (recipe.training.seed, recipe.training.learning_rate) == (3, 5e-5)
    assert recipe.values["model_config"] == {"loss": "sigmoid"}


def test_a_missing_recipe_lists_the_presets():
    with pytest.raises(ValueError, match=r"dmeo is not a recipe \(article, demo, fine-tune, .*If it is data"):
        load_recipe("dmeo")


def test_output_folder_is_named_after_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD.replace("  output_dir: out\n", "")))
    assert recipe.training.output_dir == "runs/recipe"


@pytest.mark.parametrize("name", preset_names("recipes"))
def test_every_recipe_of_the_package_is_valid_and_says_how_it_is_run(name):
    needs_data = name != "demo"
    if needs_data:
        with pytest.raises(ValueError, match=f"{name} names no data. Add --set source=FOLDER;"):
            load_recipe(name)
    start = {"model": "org/name"} if name == "fine-tune" else {}
    recipe = load_recipe(name, {**start, **({"source": "mine"} if needs_data else {})})
    assert isinstance(recipe.model, str if start else ModelPreset)


@pytest.mark.parametrize("name", preset_names("models"))
def test_every_model_preset_names_towers(name, tmp_path):
    preset = load_recipe(write(tmp_path, GOOD.replace("tiny", name))).model
    assert preset.vision
    assert preset.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vision: resnet18\ntext: {n_layer: 1}\npretrained: false", "text: there is no 'n_layer'; .* 'n_layers'"),
        ("vision: resnet18\ntext: bert\nconfig:", "config=None is not allowed; use a mapping"),
        (
            "vision: resnet18\ntext: bert\nconfig: {projektion: mlp}",
            "no 'projektion'; .* 'projection'",
        ),
        ("vison: resnet18\ntext: bert", "there is no 'vison'"),
    ],
)
def test_a_wrong_preset_file_is_refused(text, message, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, GOOD), {"model": preset})


def test_a_frozen_towers_learning_rate_is_said_to_have_no_effect(tmp_path, caplog):
    load_recipe(write(tmp_path, GOOD), {"freeze_vision": True, "vision_learning_rate": 1e-4})
    assert "vision_learning_rate has no effect" in caplog.text


def test_a_random_model_can_be_built_without_any_download(tmp_path):
    model = build_model(load_recipe(write(tmp_path, GOOD)).model)
    processor = model.processor
    token_ids = processor(text="A cat, 2 dogs!")["input_ids"]
    assert token_ids.max() < len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.tokenizer.unk_token_id not in token_ids


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (ModelPreset(vision="resnet5", text={}, pretrained=False), "vision='resnet5' is not an architecture"),
        (ModelPreset(vision="resnet18", text="bert", pretrained=False), "use fields of a DistilBERT config"),
        (ModelPreset(vision="resnet18", text={"dim": "x"}, pretrained=False), "text_config is not allowed: .*dim"),
        (ModelPreset(vision="resnet18", text={}), "text={} is a config, .*use the name of a pretrained tower"),
        (replace(TINY, pretrained_cfg={"crop": 1.0}), "no 'crop' that can be changed; it has crop_mode, crop_pct"),
        (replace(TINY, pretrained_cfg={"crop_pct": "all"}), "pretrained_cfg=.*'all'.* is not allowed"),
    ],
)
def test_a_wrong_preset_is_refused(preset, message):
    with pytest.raises(ValueError, match=message):
        build_model(preset)


def test_a_preset_can_have_a_second_vision_tower():
    model = build_model(replace(TINY, side_vision="test_efficientnet"))
    assert [tower.config.architecture for tower in model.vision_towers()] == ["resnet18", "test_efficientnet"]


def test_a_preset_can_change_how_images_are_prepared():
    plain = build_model(TINY).processor
    model = build_model(replace(TINY, pretrained_cfg={"crop_pct": 1.0}))
    processor = model.processor
    assert plain.image_processor.size["shortest_edge"] > plain.image_processor.crop_size["height"]
    assert processor.image_processor.size["shortest_edge"] == processor.image_processor.crop_size["height"]
    assert processor.image_processor.image_mean == plain.image_processor.image_mean
    assert model.config.vision_config.pretrained_cfg["crop_pct"] == 1.0


FACTS = "  image_column: photo\n  caption_column: words\n  image_root: there\n  config_name: en\n"
NO_FACTS = {"image_column": None, "caption_column": None, "image_root": None, "config_name": None}


@pytest.mark.parametrize(
    ("override", "kept", "license"),
    [
        ([], {"image_column": "photo", "caption_column": "words", "image_root": "there"}, "cc0-1.0"),
        (["source=photos"], {"image_column": "photo"}, "cc0-1.0"),
        (["split_seed=3"], {"image_column": "photo"}, "cc0-1.0"),
        (["source=mine"], NO_FACTS, None),
        (["data.source=mine", "license=cc0-1.0"], {"image_column": None}, "cc0-1.0"),
        (["image_column=b", "source=mine"], {"image_column": "b", "caption_column": None}, None),
    ],
)
def test_what_a_recipe_knows_of_its_own_data_does_not_hold_for_other_data(override, kept, license, tmp_path, caplog):
    text = GOOD.replace("  source: photos\n", f"  source: photos\n{FACTS}")
    recipe = load_recipe(write(tmp_path, f"license: cc0-1.0\n{text}"), parse_changes(override))
    assert recipe.license == recipe.values.get("license") == license
    assert {name: getattr(recipe.data, name) for name in kept} == kept
    assert {name: recipe.values["data"].get(name) for name in kept} == kept
    assert recipe.data.validation_fraction == 0.2
    gone = [name for name, value in kept.items() if value is None]
    assert ("holds for photos and not for mine" in caplog.text) == bool(gone)
    assert all(f"{name}: " in caplog.text for name in gone)
    assert ("set license before you push" in caplog.text) == (license is None)


def test_the_license_of_the_demo_is_not_claimed_for_other_images():
    assert load_recipe("demo").license == "apache-2.0"
    assert load_recipe("demo", {"source": "mine"}).license is None
    assert read_data_section("demo", {"source": "mine"})["source"] == "mine"
    same = Path(__file__).parents[2] / "examples" / "photos"
    assert load_recipe("demo", {"source": same}).license == "apache-2.0"  # by another name


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model: tiny", "model: tiny\nmodel: other", "'model' is in line 2 and again in line 3; keep one"),
        (
            "  warmup_steps: 10",
            "  warmup_steps: 10\n  learning_rate: 1",
            "'learning_rate' is in line 8 and again in line 11",
        ),
    ],
)
def test_a_repeated_key_is_refused(old, new, words, tmp_path):
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(file)


def test_yaml_that_merges_is_read(tmp_path):
    text = GOOD.replace("training:", "training:\n  <<: &common {logging_steps: 7, max_grad_norm: 2.0}").replace(
        "  learning_rate", "  max_grad_norm: 3.0\n  learning_rate"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.training.logging_steps, recipe.training.max_grad_norm) == (7, 3.0)


def test_of_a_recipe_whose_training_is_for_another_machine_the_data_can_be_read(tmp_path):
    text = GOOD.replace("bf16: false", "bf16: maybe")
    data = read_data_section(str(write(tmp_path, text)), {"split_seed": 4})
    assert (data["source"], data["split_seed"]) == ("photos", 4)


def test_one_value_of_an_option_can_be_set(tmp_path):
    file = write(tmp_path, GOOD)
    recipe = load_recipe(file, {"lora.parts": "text", "training.lora.rank": 4})
    assert recipe.training.lora_options == Lora("text", 4)
    recipe = load_recipe(file, {"hard_negatives": {"weight": 0.5}, "hard_negatives.start": 0.1})
    assert recipe.training.hard_negative_options == HardNegatives(0.5, 0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora=text", r"lora='text' is not allowed; use \{parts: \.\.\., rank: \.\.\.\}"),
        ("augment=true", r"augment=True is not allowed; use \{crop_scale: "),
        ("lora.rank=4", r"lora\.parts is missing; set it"),
        ("teacher={}", r"teacher\.file is missing; set it"),
        ("seed.x=1", "seed must hold `key: value` lines, not int"),
        ("data.license=mit", "no 'license' any more; set `license` at the top of the recipe"),
        ("check_images=false", "no 'check_images' any more; set nothing instead: every image is checked once"),
        ("lora_rank=4", r"no 'lora_rank' any more; set lora: \{parts"),
        ("training.lora.rank.x=4", "too many parts"),
    ],
)
def test_options_with_several_values_say_what_is_wrong(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, GOOD.replace("training:", "training:\n  seed: 1")), parse_changes([override]))


def test_data_of_a_run_of_an_earlier_version_is_read(tmp_path):
    text = GOOD.replace(
        "  source: photos\n",
        "  source: photos\n  license: cc0-1.0\n  share_duplicate_ids: true\n  check_images: true\n",
    )
    (tmp_path / "recipe_as_run.yaml").write_text(text)
    assert read_data_section(str(tmp_path / "recipe_as_run.yaml"), {})["source"] == "photos"


def test_data_in_place_of_a_recipe_tune_the_model_that_is_named(tiny_folder):
    recipe = load_recipe("my_images.csv", {"model": tiny_folder, "split_seed": 3})
    assert (recipe.model, recipe.data.source, recipe.data.split_seed) == (str(tiny_folder), "my_images.csv", 3)
    named = load_recipe("fine-tune", {"model": tiny_folder, "source": "my_images.csv", "split_seed": 3})
    assert recipe.values == named.values
    with pytest.raises(
        ValueError, match=r"my_images is not a recipe .*clipmini train demo --source my_images.*--model"
    ):
        load_recipe("my_images")
