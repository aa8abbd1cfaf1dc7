"""What a trainer writes: no pickled arguments, and models on the Hub."""

import pytest
import torch
from huggingface_hub import ModelCard, constants

from clipmini.recipe_files import parse_changes
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import character_tokenizer
from clipmini.training.lora import merge_lora
from clipmini.training.recipes import load_recipe
from clipmini.training.run import train
from clipmini.training.trainer import ClipMiniTrainer
from hub_repositories import Repository
from modeling_clipmini import ClipMiniModel
from pair_files import write_images

ABOUT = {"license": "mit", "dataset": "org/pairs"}


@pytest.fixture
def make_trainer(tiny_model, tiny_processor, toy_pairs, tmp_path):
    def make(**options):
        args = ClipMiniTrainingArguments(
            output_dir=str(tmp_path / "mine"),
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="no",
            cache_features=False,
            **options,
        )
        return ClipMiniTrainer(
            tiny_model, args, toy_pairs.select(range(8)), toy_pairs.select(range(8, 12)), tiny_processor
        )

    return make


def test_no_arguments_are_pickled(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "mine" / "checkpoint-1" / "model.safetensors").exists()
    assert list(tmp_path.rglob("training_args.bin")) == []
    trainer.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-1"))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("lora", [None, {"parts": "text"}])
def test_push_to_hub_is_one_commit_like_that_of_the_command(make_trainer, hub, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    trainer = make_trainer(hub_model_id="org/clipmini", hub_private_repo=True, hub_revision="v1", lora=lora)
    trainer.train()
    commit = trainer.push_to_hub("Trained", **ABOUT, finetuned_from=["timm/a", "org/b"], tags="toys", language="en")
    repository = hub.models["org/clipmini"]
    assert repository.is_private
    assert repository.titles("v1") == ["Trained", "initial commit"]
    assert repository.titles("main") == ["initial commit"]
    assert commit.oid == repository.at("v1").sha
    files = repository.at("v1").files
    assert {"README.md", "config.json", "model.safetensors", "loss_clipmini.py", "tokenizer.json"} <= set(files)
    assert not [path for path in files if path.endswith((".bin", ".pt"))]
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.license, card.data.datasets, card.data.language) == ("mit", ["org/pairs"], "en")
    assert (card.data.base_model, "toys" in card.data.tags) == (["timm/a", "org/b"], True)
    assert "The author states `mit` as the license" in card.text
    assert "captions of the validation split, **" in card.text
    assert "| train | 8 | 16 |" in card.text
    for path, file in files.items():
        (tmp_path / path).write_bytes(file.content)
    model = ClipMiniModel.from_pretrained(tmp_path)
    merge_lora(trainer.model)  # which a push does to a copy alone
    trained = trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())


def test_push_to_hub_need_not_be_waited_for(make_trainer, hub):
    trainer = make_trainer()
    promise = trainer.push_to_hub(blocking=False, **ABOUT)
    assert promise.result().oid == hub.models["org/mine"].at("main").sha  # named after the output folder


def test_saving_pushes_nothing(make_trainer, hub, tmp_path):
    trainer = make_trainer(push_to_hub=True, hub_model_id="org/clipmini")
    trainer.save_model()
    assert (tmp_path / "mine" / "model.safetensors").exists()
    assert hub.models["org/clipmini"].titles() == ["initial commit"]


def test_what_trainers_own_cards_take_is_taken(make_trainer, hub, caplog):
    trainer = make_trainer(hub_model_id="org/clipmini")
    trainer.push_to_hub(**ABOUT, tasks="image-classification", dataset_tags="pairs", dataset_args="en")
    assert len(hub.models["org/clipmini"].titles()) == 2
    assert "have no effect" in caplog.text


def test_nothing_is_made_on_the_hub_for_a_model_that_cannot_be_pushed(make_trainer, hub):
    trainer = make_trainer()
    torch.nn.init.constant_(trainer.model.visual_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        trainer.push_to_hub(**ABOUT)
    assert hub.models == {}


def test_a_public_repository_stops_a_private_run_before_it_begins(recipe, hub, tmp_path):
    hub.models["org/clipmini"] = Repository("org/clipmini")
    with pytest.raises(ValueError, match="org/clipmini exists and is public"):
        train(recipe("hub_model_id=org/clipmini", "license=cc0-1.0", "hub_private_repo=true"))
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_after_training_says_how_to_repeat_it(recipe, hub, tmp_path):
    hub.fail("POST /api/models/org/clipmini/commit", status=500)
    match = r"has a problem.* clipmini push \S+/run/model org/clipmini --private"
    with pytest.raises(ValueError, match=match) as error:
        train(recipe("hub_model_id=org/clipmini", "license=cc0-1.0", "hub_private_repo=true"))
    assert "the model is trained and saved" in str(error.value)
    assert (tmp_path / "run" / "results.json").exists()


def test_push_to_hub_asks_for_license_and_data(make_trainer, hub):
    trainer = make_trainer()
    for about in ({}, {"license": "mit"}, {"dataset": "org/pairs"}):
        with pytest.raises(ValueError, match=r"pass push_to_hub\(license="):
            trainer.push_to_hub(**about)
    assert hub.requests == []


def test_a_repository_that_cannot_be_made_stops_a_run_before_it_begins(make_trainer, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="org/clipmini: the Hub needs a valid token"):
        make_trainer(push_to_hub=True, hub_model_id="org/clipmini")


def test_a_checkpoint_is_never_pushed(make_trainer, hub):
    with pytest.raises(ValueError, match="hub_strategy other than 'end'"):
        make_trainer(push_to_hub=True, hub_strategy="every_save")
    make_trainer(push_to_hub=True, hub_model_id="org/clipmini").train()
    assert hub.models["org/clipmini"].titles() == ["initial commit"]


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a model of twelve images."""
    folder = write_images(tmp_path / "images", 12)
    lines = [f"{number}.png,number {number}" for number in range(12)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    file = tmp_path / "recipe.yaml"
    file.write_text("model: tiny\ntraining: {num_train_epochs: 1, use_cpu: true, push_to_hub: true}\n")

    def make(*overrides):
        return load_recipe(str(file), {"source": folder, "output_dir": tmp_path / "run", **parse_changes(overrides)})

    return make


@pytest.fixture
def preset(tiny_model, tmp_path):
    """A preset of towers that lie in folders here."""
    vision, text = tmp_path / "vision", tmp_path / "text"
    tiny_model.vision_model.save_pretrained(vision)
    tiny_model.text_model.save_pretrained(text)
    character_tokenizer().save_pretrained(text)
    for tower in (vision, text):
        (tower / "README.md").write_text("---\nlicense: mit\n---\n")
    file = tmp_path / "preset.yaml"
    file.write_text(f"vision: {vision}\ntext: {text}\nconfig: {{projection_dim: 16}}\n")
    return file


def test_a_recipe_can_end_with_a_push(recipe, preset, hub, tmp_path):
    train(recipe("hub_model_id=org/clipmini", "license=cc0-1.0", "hub_private_repo=true", f"model={preset}"))
    repository = hub.models["org/clipmini"]
    assert repository.titles() == ["Upload model with clipmini", "initial commit"]
    assert repository.is_private
    files = repository.at("main").files
    assert {"results.json", "curves.png", "README.md", "NOTICE"} <= set(files)
    assert "samples.jpg" not in files  # images of the data are pushed only by hand
    assert b'"org/clipmini"' in files["README.md"].content
    texts = [file.content for path, file in files.items() if path.endswith((".md", ".json", ".py", "NOTICE"))]
    assert not any(str(tmp_path).encode() in text for text in texts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["license=cc0-1.0"], "hub_model_id=None: name the repository as owner/name"),
        (["hub_model_id=org/clipmini"], "push_to_hub needs the model's license"),
    ],
)
def test_what_a_push_would_refuse_stops_a_run_before_it_begins(recipe, hub, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(*overrides))
    assert not (tmp_path / "run").exists()
    assert hub.requests == []


def test_a_recipe_holds_no_token(recipe):
    with pytest.raises(ValueError, match=r"training\.hub_token would be saved with the model"):
        recipe("hub_token=hf_secret")
    assert constants.HF_HUB_OFFLINE
