import pickle
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from clipmini.data.pairs import PairDataset
from clipmini.evaluation.measure import embed_pairs, measure_split
from clipmini.evaluation.retrieval import retrieval_metrics
from clipmini.inference.embed import DualEncoder
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.batches import ClipMiniCollator
from clipmini.training.features import prepare_features
from clipmini.training.stages import parameter_groups
from clipmini.training.trainer import ClipMiniTrainer, NonFiniteLossError
from modeling_clipmini import ClipMiniModel


def make_arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ClipMiniTrainingArguments(**{**defaults, **options})


@pytest.fixture
def make_trainer(tiny_config, tiny_processor, toy_pairs, tmp_path):
    def make(folder="run", model=None, **options):
        if model is None:
            torch.manual_seed(0)
            model = ClipMiniModel(tiny_config())
        model.processor, args = tiny_processor, make_arguments(tmp_path / folder, **options)
        features = prepare_features(model, {"train": toy_pairs, "validation": toy_pairs}, args)
        return ClipMiniTrainer(model, args, features["train"], features["validation"])

    return make


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, other, tolerance):
    for (name, weight), other_weight in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, other_weight, atol=tolerance), name


@pytest.mark.parametrize("frozen", [(), ("vision",), ("text",), ("vision", "text")])
def test_what_may_move_moves_and_what_is_frozen_does_not(frozen, make_trainer):
    trainer = make_trainer(**{f"freeze_{tower}": True for tower in frozen}, max_steps=3, warmup_steps=0)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if not name.startswith(tuple(f"{tower}_model." for tower in frozen))}
    # Tokens that no caption holds, and positions past the longest caption, have nothing to learn from.
    assert moved == expected


def test_frozen_towers_are_computed_once_and_training_is_the_same(make_trainer):
    frozen = {"freeze_vision": True, "freeze_text": True, "num_train_epochs": 2}
    cached = make_trainer(**frozen)
    cached.train()
    uncached = make_trainer(**frozen, cache_features=False)
    uncached.train()
    assert {"pooled_image", "pooled_text"} <= set(cached.train_dataset[0, 0])
    assert {"image", "caption"} <= set(uncached.train_dataset[0, 0])
    assert_same_weights(cached.model, uncached.model, 1e-5)
    measured, measured_again = cached.evaluate(), uncached.evaluate()
    assert all(measured_again[name] == value for name, value in measured.items() if "recall" in name or "_r1" in name)


def test_one_tower_may_be_cached_while_the_other_trains(make_trainer):
    trainer = make_trainer(freeze_vision=True)
    assert set(trainer.train_dataset[3, 0]) == {"image_id", "row", "pooled_image", "caption"}
    batch = trainer.data_collator([trainer.train_dataset[i, 0] for i in range(4)])
    assert {"pooled_image", "input_ids"} <= set(batch)
    trainer.train()


def test_evaluate_is_retrieval_over_the_whole_split(make_trainer, toy_pairs):
    trainer = make_trainer(per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    embeds = embed_pairs(DualEncoder(trainer.model.eval()), toy_pairs)
    expected = retrieval_metrics(embeds.images, embeds.texts, PairDataset(toy_pairs).image_of_captions())
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert "eval_loss" not in metrics
    several = trainer.evaluate({"a": toy_pairs, "b": toy_pairs})
    assert several["eval_a_mean_recall"] == several["eval_b_mean_recall"]


def test_copies_of_a_image_that_share_an_id_are_right_answers(tiny_model, toy_pairs):
    together = toy_pairs.select([0, 0])
    rows = [{**row, "image_id": number} for number, row in enumerate(together)]
    apart = type(toy_pairs).from_list(rows, toy_pairs.features)
    for pairs, recall, by_chance in ((together, 1, 1), (apart, 0, 0.5)):  # ties count against the model
        measured, _ = measure_split(tiny_model, pairs)
        assert measured["after"]["text_to_image_r1"] == recall
        assert measured["chance"]["text_to_image_r1"] == by_chance


def test_evaluation_leaves_the_model_in_its_mode(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    trainer.evaluate()
    assert trainer.model.training


def test_it_learns_and_ends_with_the_best_checkpoint(make_trainer, tiny_config):
    torch.manual_seed(0)
    trainer = make_trainer(
        model=ClipMiniModel(tiny_config(vision_config={"architecture": "test_vit"})),
        num_train_epochs=15,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    history = [entry["eval_mean_recall"] for entry in trainer.state.log_history if "eval_mean_recall" in entry]
    assert trainer.state.best_metric == max(history)
    assert trainer.evaluate()["eval_mean_recall"] == pytest.approx(max(history))
    assert max(history) > measure_split(trainer.model, trainer.eval_dataset)[0]["chance"]["mean_recall"] + 0.2


def test_a_run_goes_on_from_its_checkpoint(make_trainer, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 5}
    whole = make_trainer("whole", **options)
    whole.train()
    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(whole.model, resumed.model, 1e-6)


def test_a_run_killed_after_its_last_step_takes_no_more(make_trainer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer("whole", **options)
    whole.train()
    assert 0 < whole.state.epoch % 1 < 1  # amid an epoch
    resumed = make_trainer("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert_same_weights(whole.model, resumed.model, 0)


def test_each_part_has_its_learning_rate_and_only_matrices_decay(tiny_model, tmp_path):
    args = make_arguments(
        tmp_path, learning_rate=3.0, vision_learning_rate=1.0, text_learning_rate=2.0, weight_decay=0.1
    )
    of = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(tiny_model, args)
        for p in group["params"]
    }
    assert len(of) == len(list(tiny_model.parameters()))
    assert of[id(tiny_model.vision_model.timm_model.conv1[0].weight)] == (1.0, 0.1)
    assert of[id(tiny_model.vision_model.timm_model.bn1.weight)] == (1.0, 0.0)
    assert of[id(tiny_model.text_model.embeddings.word_embeddings.weight)] == (2.0, 0.1)
    assert of[id(tiny_model.text_projection.weight)] == (3.0, 0.1)
    assert of[id(tiny_model.logit_scale)] == (3.0, 0.0)


def test_towers_follow_the_heads_unless_told_otherwise(tiny_model, tmp_path):
    groups = parameter_groups(tiny_model, make_arguments(tmp_path, learning_rate=0.5, text_learning_rate=0.0))
    assert {group["lr"] for group in groups} == {0.5, 0.0}


def test_data_parallel_is_refused_with_the_remedy(make_trainer, monkeypatch):
    monkeypatch.setattr(ClipMiniTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs .* DataParallel.*CUDA_VISIBLE_DEVICES"):
        make_trainer()


def test_moving_batch_norm_statistics_are_refused_in_several_processes(make_trainer, monkeypatch):
    monkeypatch.setattr(ClipMiniTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"freeze_batch_norm=False with 2 processes: .*conv1\.1"):
        make_trainer(freeze_batch_norm=False)


def test_a_batch_larger_than_the_data_still_trains(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=64)
    before = weights_of(trainer.model)
    trainer.train()
    assert not torch.equal(before["text_projection.weight"], trainer.model.text_projection.weight)


def test_the_plain_trainer_trains_it_too(tiny_config, tiny_processor, toy_pairs, tmp_path):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config())
    before = weights_of(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, remove_unused_columns=False, disable_tqdm=True, use_cpu=True
        ),
        train_dataset=toy_pairs,
        eval_dataset=toy_pairs,
        data_collator=ClipMiniCollator(tiny_processor),
    )
    trainer.train()
    assert not torch.equal(before["text_projection.weight"], model.text_projection.weight)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_bar_with_figures_and_a_line_for_each_evaluation(
    is_quiet, tiny_model, tiny_processor, toy_pairs, tmp_path, capsys
):
    arguments = ClipMiniTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        disable_tqdm=is_quiet,
    )
    trainer = ClipMiniTrainer(
        tiny_model, arguments, train_dataset=toy_pairs, eval_dataset=toy_pairs, processing_class=tiny_processor
    )
    capsys.readouterr()
    trainer.train()
    out, err = capsys.readouterr()
    if is_quiet:
        assert "loss=" not in err
        assert "text to image" not in err
        return
    assert out == ""  # it is for results
    lines = re.findall(r"step \d/\d+, epoch \d: text to image R@1 [\d.]+, text to image R@5 [\d.]+, image to", err)
    assert len(lines) == 2
    assert "loss=" in err
    assert "pairs_per_second=" in err
    assert "{'loss'" not in err


@pytest.mark.parametrize("loss", [float("nan"), float("-inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_the_images(loss):
    error = NonFiniteLossError(loss, 7, [f"{number}.jpg" for number in range(8)])
    assert str(error).startswith(f"the loss is {loss} at step 7, on the images 0.jpg, 1.jpg, ")
    assert "7.jpg; lower learning_rate" in str(error)
    assert "max_grad_norm" in str(error)
    assert "fp16" in str(error)
    assert isinstance(error, ValueError)  # one sentence of the command


def test_of_many_images_the_first_are_named():
    assert "6.jpg, 7.jpg and 3 more; lower" in str(
        NonFiniteLossError(float("nan"), 7, [f"{n}.jpg" for n in range(11)])
    )
    assert "at step 7; lower" in str(NonFiniteLossError(float("nan"), 7, []))


def test_features_of_what_is_trained_are_refused(make_trainer, toy_pairs, tmp_path):
    frozen = make_trainer(freeze_vision=True, freeze_text=True)
    for options in ({}, {"freeze_vision": True}, {"freeze_text": True}):
        with pytest.raises(ValueError, match=r"features of the (vision|text) tower, which these arguments train"):
            ClipMiniTrainer(frozen.model, make_arguments(tmp_path, **options), frozen.train_dataset.pairs)
    stages = make_trainer(vision_stages=2)
    with pytest.raises(ValueError, match="features of the vision tower, which these arguments train"):
        ClipMiniTrainer(stages.model, make_arguments(tmp_path), stages.train_dataset.pairs)


def test_a_frozen_tower_without_features_is_said_to_run_at_every_step(make_trainer, toy_pairs, tmp_path, caplog):
    model = make_trainer().model
    assert "runs at every step" not in caplog.text
    ClipMiniTrainer(model, make_arguments(tmp_path, freeze_text=True), toy_pairs)
    assert "the frozen text tower runs at every step: pass what training.features.prepare_features" in caplog.text


def test_a_data_worker_gets_no_model(make_trainer):
    trainer = make_trainer(vision_stages=2)
    data = pickle.dumps(trainer.train_dataset)
    assert len(data) < 100_000
    item = pickle.loads(data)[3, 0]
    assert torch.equal(item["vision_hidden"], trainer.train_dataset[3, 0]["vision_hidden"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("options", [{}, {"freeze_vision": True, "freeze_text": True}, {"vision_stages": 2}])
def test_it_learns_on_a_gpu_in_bf16(make_trainer, options):
    trainer = make_trainer(use_cpu=False, bf16=True, num_train_epochs=20, per_device_train_batch_size=12, **options)
    before = trainer.evaluate()["eval_mean_recall"]
    trainer.train()
    assert trainer.model.device.type == "cuda"
    logged = trainer.state.log_history
    assert logged[-1]["train_loss"] < next(entry["loss"] for entry in logged if "loss" in entry)
    assert trainer.evaluate()["eval_mean_recall"] >= before
