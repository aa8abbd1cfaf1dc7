"""Each option of `ClipMiniTrainingArguments`, in a whole run of the trainer."""

import importlib.util
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from clipmini.evaluation.measure import measure_pairs
from clipmini.files import cache_root
from clipmini.inference.teacher import embed_with_teacher
from clipmini.training import trainer as trainer_module
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.features import prepare_features
from clipmini.training.trainer import ClipMiniTrainer, NonFiniteLossError
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.images_clipmini import read_image


@pytest.fixture
def make_trainer(tiny_config, tiny_processor, toy_pairs, tmp_path):
    def make(folder="run", config=(), **options):
        torch.manual_seed(0)
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 6,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
        }
        model, args = ClipMiniModel(tiny_config(**dict(config))), ClipMiniTrainingArguments(**{**defaults, **options})
        model.processor = tiny_processor
        features = prepare_features(model, {"train": toy_pairs, "validation": toy_pairs}, args)
        return ClipMiniTrainer(model, args, features["train"], features["validation"])

    return make


MAX_POOL = {"global_pool": "max"}
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64, "vocab_size": 141}
NO_DROPOUT = {"text_config": {**SIZES, "dropout": 0.0, "attention_dropout": 0.0}}


def weights_after(trainer):
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=tolerance), name


@pytest.mark.parametrize(
    ("package", "options"),
    {
        "bitsandbytes": {"optim": "adamw_bnb_8bit"},
        "galore_torch": {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
        "lomo_optim": {"optim": "lomo"},
        "schedulefree": {"optim": "schedule_free_adamw"},
        "torchao": {"optim": "adamw_torch_8bit"},
        "deepspeed": {"deepspeed": {"zero_optimization": {"stage": 0}}},
    }.items(),
)
def test_a_package_that_is_missing_is_named_before_any_data_is_read(package, options):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    name = package.replace("_", ".")  # some are written with a hyphen
    with pytest.raises(ValueError, match=rf"(?i)cannot be used here: .*{name}.*\. Correct it, install") as caught:
        ClipMiniTrainingArguments(output_dir="run", use_cpu=True, **options)
    assert len(str(caught.value)) < 500
    assert not is_deepspeed_zero3_enabled()  # nor is any later run taken for one of deepspeed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycle": 2}}, "num_cycle"),
        ({"accelerator_config": {"split_batch": True}}, "split_batch"),
    ],
)
def test_options_of_options_are_checked_before_any_data_is_read(options, named):
    with pytest.raises(ValueError, match=f"cannot be used here: .*{named}.* Correct it"):
        ClipMiniTrainingArguments(output_dir="run", use_cpu=True, **options)


def test_what_a_run_reports_to_must_be_installed(monkeypatch):
    monkeypatch.setattr("clipmini.training.arguments.get_available_reporting_integrations", lambda: ["mlflow"])
    for name in ("wandb", "neptune", "nobody"):
        with pytest.raises(ValueError, match=f"report_to={name} is not installed; install it, .*: mlflow"):
            ClipMiniTrainingArguments(output_dir="run", use_cpu=True, report_to=["mlflow", name])


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_a_gradient_cache_trains_the_same(make_trainer, loss):
    config = {**NO_DROPOUT, "loss": loss}
    # Adam would make much of a rounding error near zero, and so would further steps.
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    plain = weights_after(make_trainer(config=config, **options))
    cached = weights_after(make_trainer(config=config, **options, gradient_cache_chunk=4))
    assert_same(plain, cached)


def gradients_of_steps(trainer):
    """The gradient of every parameter at each step of the optimizer, as it is before the step."""
    steps = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            steps.append({name: value.grad.clone() for name, value in model.named_parameters()})

    trainer.add_callback(Recorder())
    trainer.train()
    return steps


def assert_mean(found, *parts):
    """Compare gradients with the mean of some others."""
    assert max(value.abs().max() for value in found.values()) > 1e-3
    assert_same(found, {name: sum(part[name] for part in parts) / len(parts) for name in found}, 1e-6)


@pytest.mark.parametrize("chunk", [None, 3])
def test_accumulated_gradients_are_the_mean_of_the_batches(make_trainer, chunk):
    """Three batches an epoch, two of which make a step; the third makes the next one alone."""
    at_rest = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": 0.0}
    options = {**at_rest, "per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1}
    trainer = make_trainer(config=NO_DROPOUT, **options, gradient_cache_chunk=chunk)
    first, second, third = gradients_of_steps(trainer)
    trainer = make_trainer(config=NO_DROPOUT, **options, gradient_cache_chunk=chunk, gradient_accumulation_steps=2)
    both, last = gradients_of_steps(trainer)
    assert not torch.allclose(first["text_projection.weight"], second["text_projection.weight"], atol=1e-4)
    assert_mean(both, first, second)
    assert_mean(last, third)


@pytest.mark.parametrize("chunk", [None, 3])
def test_each_of_several_processes_scales_its_share_since_gradients_are_averaged(make_trainer, monkeypatch, chunk):
    """`ContrastiveObjective` returns shares that sum to the loss, and torch takes the mean of their gradients."""
    found = []
    for num_processes in (1, 4):
        monkeypatch.setattr(trainer_module, "world_size", lambda number=num_processes: number)
        trainer = make_trainer(config=NO_DROPOUT, max_steps=1, max_grad_norm=0.0, gradient_cache_chunk=chunk)
        found.append(gradients_of_steps(trainer)[0])
    one, four = found
    assert_mean({name: value / 4 for name, value in four.items()}, one)


@pytest.mark.parametrize("length_groups", [1, 3])
def test_a_gradient_cache_trains_the_same_under_bf16(make_trainer, length_groups):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "bf16": True, "length_groups": length_groups}
    exact = weights_after(make_trainer(config=NO_DROPOUT, **{**options, "bf16": False}))
    plain = weights_after(make_trainer(config=NO_DROPOUT, **options))
    cached = weights_after(make_trainer(config=NO_DROPOUT, **options, gradient_cache_chunk=4))
    assert any(not torch.equal(exact[name], plain[name]) for name in plain)  # autocast was on
    assert_same(plain, cached, 1e-3)  # bf16 keeps three digits


@pytest.mark.parametrize("chunk", [None, 4])
def test_groups_of_like_length_train_the_same(make_trainer, chunk):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "gradient_cache_chunk": chunk}
    plain = weights_after(make_trainer(config=NO_DROPOUT, **options))
    grouped = weights_after(make_trainer(config=NO_DROPOUT, **options, length_groups=3))
    assert_same(plain, grouped)


def test_a_gradient_cache_with_batch_norm_in_train_mode_is_refused(make_trainer):
    with pytest.raises(ValueError, match="freeze_batch_norm"):
        make_trainer(gradient_cache_chunk=2, freeze_batch_norm=False).train()


def test_batch_norm_statistics_are_kept_unless_asked_otherwise(make_trainer):
    name = "vision_model.timm_model.conv1.1.running_mean"
    trainer, other = make_trainer(max_steps=1), make_trainer(max_steps=1, freeze_batch_norm=False)
    before = trainer.model.state_dict()[name].clone()
    assert torch.equal(weights_after(trainer)[name], before)
    assert not torch.equal(weights_after(other)[name], before)


def test_training_the_last_stages_from_cached_activations_is_training_them_from_images(
    make_trainer, tiny_processor, toy_pairs
):
    options = {"vision_stages": 2, "optim": "sgd", "learning_rate": 0.1}
    cached = make_trainer(config=NO_DROPOUT, **options)
    assert "vision_hidden" in cached.train_dataset[0, 0]
    before = {name: value.clone() for name, value in cached.model.state_dict().items()}
    after = weights_after(cached)
    assert_same(after, weights_after(make_trainer(config=NO_DROPOUT, **options, cache_features=False)), 1e-3)
    moved = {name for name in after if not torch.equal(before[name], after[name]) and name.startswith("vision")}
    assert moved
    assert not any(
        name.startswith(("vision_model.timm_model.conv1", "vision_model.timm_model.layer1")) for name in moved
    )
    from_images = measure_pairs(cached.model, toy_pairs)
    assert cached.evaluate()["eval_mean_recall"] == pytest.approx(from_images["mean_recall"], abs=0.05)


def test_a_tower_of_tokens_trains_its_last_stages_from_cached_ones(make_trainer, tiny_processor):
    side = tiny_processor.image_processor.crop_size["height"]
    vision = {"architecture": "mixer_s32_224", "model_args": {"img_size": side}}
    config = {**NO_DROPOUT, "vision_config": vision}
    options = {"vision_stages": 2, "optim": "sgd", "max_steps": 1}
    split = make_trainer(config=config, **options)
    assert split.train_dataset.pairs.frozen_stages is not None
    assert split.train_dataset[0, 0]["vision_hidden"].ndim == 2
    whole = make_trainer(config=config, **options, cache_features=False)
    assert_same(weights_after(split), weights_after(whole), 1e-3)


def test_activations_serve_where_no_level_lies_before_them(make_trainer):
    config = {**NO_DROPOUT, "vision_levels": [3, 4]}
    options = {"vision_stages": 2, "optim": "sgd", "max_steps": 2}
    split = make_trainer(config=config, **options)
    assert split.train_dataset.pairs.frozen_stages is not None
    assert_same(weights_after(split), weights_after(make_trainer(config=config, **options, cache_features=False)))


def test_a_side_tower_is_cached_beside_the_activations_and_stays_as_it_is(make_trainer):
    config = {**NO_DROPOUT, "side_vision_config": {"architecture": "test_convnext"}, "vision_levels": [3]}
    options = {"vision_stages": 2, "optim": "sgd", "max_steps": 2}
    split = make_trainer(config=config, **options)
    before = {name: value.clone() for name, value in split.model.vision_model.state_dict().items()}
    pairs = split.train_dataset.pairs
    pixels = split.processing_class(images=[read_image(image) for image in pairs.rows["image"]])["pixel_values"]
    packed = torch.from_numpy(pairs.image_features[:, 0]).float()
    with torch.no_grad():
        torch.testing.assert_close(
            pairs.frozen_stages.resume(split.model, packed), split.model.pool_images(pixels), rtol=0, atol=2e-2
        )
    whole = weights_after(make_trainer(config=config, **options, cache_features=False))
    assert_same(weights_after(split), whole, 1e-3)
    after = split.model.vision_model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("side.") for name in moved)


@pytest.mark.parametrize(
    ("frozen", "name", "changed"),
    [
        (
            "freeze_vision",
            "image_features",
            {"vision_config": {"architecture": "test_resnet", "model_args": MAX_POOL}},
        ),
        ("freeze_text", "text_features", {"text_config": {**NO_DROPOUT["text_config"], "activation": "relu"}}),
    ],
)
def test_the_same_weights_in_another_architecture_give_other_features(make_trainer, frozen, name, changed):
    of = [
        getattr(make_trainer(config={**NO_DROPOUT, **change}, **{frozen: True}).train_dataset.pairs, name)
        for change in ({}, changed)
    ]
    assert of[0].shape == of[1].shape
    assert not torch.equal(*(torch.from_numpy(rows[:]) for rows in of))


def test_a_saved_model_finds_the_features_of_the_one_it_was(make_trainer, tmp_path):
    frozen = {"freeze_vision": True, "freeze_text": True}
    trainer = make_trainer(**frozen)
    cached = set(cache_root().rglob("*"))
    trainer.model.save_pretrained(tmp_path / "model")
    trainer.processing_class.save_pretrained(tmp_path / "model")
    prepare_features(
        ClipMiniModel.from_pretrained(tmp_path / "model"), {"train": trainer.train_dataset.pairs.rows}, trainer.args
    )
    assert cached
    assert set(cache_root().rglob("*")) == cached


def test_a_level_before_the_first_trained_stage_needs_the_whole_tower(make_trainer, caplog):
    trainer = make_trainer(config={"vision_levels": [1, 4]}, vision_stages=2)
    assert trainer.train_dataset.pairs.frozen_stages is None
    assert "vision_levels=[1, 4] needs feature maps from before" in caplog.text


def test_cached_views_are_the_augmented_images(make_trainer, toy_pairs):
    options = {"freeze_vision": True, "augment": {"crop_scale": 0.5}}
    trainer = make_trainer(**options, num_views=3)
    features = trainer.train_dataset.pairs.image_features
    assert features.shape[:2] == (len(toy_pairs), 3)
    assert len({tuple(view.tolist()) for view in torch.tensor(features[4])}) == 3
    assert trainer.eval_dataset.image_features.shape[1] == 1
    seen = {tuple(trainer.train_dataset[4, turn]["pooled_image"].tolist()) for turn in range(3)}
    assert len(seen) == 3
    trainer.train()


def test_augmentation_without_a_cache_depends_on_the_turn_alone(make_trainer):
    trainer = make_trainer(augment={})
    one, again, next_turn = (trainer.train_dataset[2, turn] for turn in (0, 0, 1))
    assert torch.equal(one["pixels"], again["pixels"])
    assert one["caption"] == again["caption"]
    assert not torch.equal(one["pixels"], next_turn["pixels"])
    trainer.train()


def test_the_seed_of_the_data_alone_draws_the_pairs(make_trainer):
    def draw(**seeds):
        trainer = make_trainer(**seeds)
        items = [trainer.train_dataset[key] for key in trainer.sampler]
        return [(item["row"], item["caption"]) for item in items]

    assert draw(seed=1, data_seed=5) == draw(seed=2, data_seed=5) == draw(seed=5)
    assert draw(seed=1) != draw(seed=5)


def test_matryoshka_widths_are_trained_and_measured(make_trainer):
    trainer = make_trainer(matryoshka_dims="8,4")
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_mean_recall", "eval_mean_recall_at_8", "eval_text_to_image_r1_at_4"} <= set(metrics)
    with pytest.raises(ValueError, match="matryoshka_dims=16 is not below the embeddings' width, 16"):
        make_trainer(matryoshka_dims=[16, 8])


def test_lora_leaves_adapters_and_resumes_from_them(make_trainer, tmp_path):
    pytest.importorskip("peft")
    options = {"lora": {"parts": "text"}, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("whole", **options)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()
    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(whole.model.state_dict(), resumed.model.state_dict(), 1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_images(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.text_projection.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 1.*image_id \d"):
        trainer.train()


def test_of_a_broken_batch_the_offending_images_are_named(make_trainer, monkeypatch):
    trainer = make_trainer()
    embed = trainer._embed

    def broken(model, batch):
        image, text = embed(model, batch)
        is_third = torch.arange(len(image)) == 2
        return image.masked_fill(is_third[:, None], math.nan), text

    monkeypatch.setattr(trainer, "_embed", broken)
    with pytest.raises(NonFiniteLossError, match=r"on the images image_id \d+;"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"freeze_text": True, "length_groups": 2}, "length_groups has no effect"),
        ({"freeze_vision": True, "augment": {}}, "augment makes one view of each image"),
        ({"num_views": 2, "augment": {}}, "num_views=2 has no effect"),
    ],
)
def test_an_option_without_effect_is_named(make_trainer, caplog, options, warning):
    make_trainer(**options)
    assert warning in caplog.text


def test_hard_negatives_begin_after_their_share_of_the_steps(make_trainer):
    trainer = make_trainer(hard_negatives={"weight": 0.7, "start": 0.5})
    trainer.state.max_steps = 10
    trainer.state.global_step = 4
    assert trainer._current_objective().hardness == 0
    trainer.state.global_step = 5
    assert trainer._current_objective().hardness == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_cache_chunk": 0}, "gradient_cache_chunk=0"),
        ({"num_views": 3}, "num_views=3 without `augment`"),
        ({"augment": {"crop": 1}}, "augment: there is no 'crop'; the nearest name is 'crop_scale'"),
        ({"freeze_text": True, "lora": {"parts": "text"}}, "contradict"),
        ({"lora": "text"}, r"lora='text' is not allowed; use \{parts: \.\.\., rank: \.\.\.\}"),
        ({"lora": {"rank": 8}}, r"lora\.parts is missing; set it"),
        ({"hard_negatives": {"weight": -1}}, r"hard_negatives\.weight=-1 is not allowed"),
        ({"hard_negatives": {"weight": 1, "start": 2}}, r"hard_negatives\.start=2 is not allowed"),
        ({"teacher": {"file": "x", "weight": 1.5}}, r"teacher\.weight=1\.5 is not allowed"),
        ({"vision_stages": 40}, "vision_stages=40: the vision tower has"),
        ({"matryoshka_dims": "8,x"}, "matryoshka_dims='8,x'"),
    ],
)
def test_options_that_cannot_work_say_so(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_a_teacher_has_its_share_of_the_loss(make_trainer, tiny_folder, toy_pairs, tmp_path):
    embed_with_teacher(tiny_folder, toy_pairs, tmp_path / "teacher.parquet", logit_scale=20.0)
    trainer = make_trainer(teacher={"file": str(tmp_path / "teacher.parquet"), "weight": 0.3})
    assert (trainer.objective.distillation, trainer.objective.teacher_scale) == (0.3, 20.0)
    trainer.train()


def test_the_best_adapter_is_loaded_at_the_end(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(lora={"parts": "text"}, load_best_model_at_end=True, **options)
    recalls = iter([0.5, 0.4])  # the first is the best, and its weights are not those of the last step
    monkeypatch.setattr(trainer, "measure", lambda pairs: {"mean_recall": next(recalls)})
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    assert torch.equal(best["base_model.model.logit_scale"], trainer.model.logit_scale)
    assert torch.equal(best["base_model.model.text_projection.weight"], trainer.model.text_projection.weight)
