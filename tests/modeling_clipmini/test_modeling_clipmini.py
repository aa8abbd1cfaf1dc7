import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipTextConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
)

from modeling_clipmini import ClipMiniModel, ClipMiniTextModel, ClipMiniVisionModel, infonce_loss, sigmoid_loss
from stranger import run_as_stranger


def make_inputs(num_pairs=3, size=64):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(num_pairs, 7, dtype=torch.long)
    attention_mask[0, 4:] = 0
    return {
        "input_ids": torch.randint(5, 60, (num_pairs, 7), generator=generator),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(num_pairs, 3, size, size, generator=generator),
    }


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("text_pooling", ["mean", "cls"])
def test_every_parameter_receives_a_gradient(projection, loss, text_pooling, tiny_config):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(projection=projection, loss=loss, text_pooling=text_pooling)).train()
    with torch.no_grad():
        for parameter in model.vision_model.parameters():  # timm starts the last norm of a residual block at zero
            parameter.add_(0.01)
    model(**make_inputs(4, size=96), image_ids=torch.tensor([0, 1, 2, 0])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_embeddings_have_length_one_and_logits_are_their_scaled_product(tiny_model):
    output = tiny_model(**make_inputs())
    assert torch.allclose(output.image_embeds.norm(dim=-1), torch.ones(3))
    assert torch.allclose(output.text_embeds.norm(dim=-1), torch.ones(3))
    expected = tiny_model.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
    assert torch.allclose(output.logits_per_image, expected)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_the_loss_is_that_of_the_embeddings_and_the_image_ids(loss, tiny_config):
    torch.manual_seed(0)
    model, ids = ClipMiniModel(tiny_config(loss=loss)).eval(), torch.tensor([4, 9, 4])
    output = model(**make_inputs(), image_ids=ids)
    pairs = output.image_embeds, output.text_embeds, model.get_logit_scale()
    expected = infonce_loss(*pairs, ids) if loss == "infonce" else sigmoid_loss(*pairs, model.logit_bias, ids)
    assert torch.allclose(output.loss, expected)
    assert not torch.allclose(output.loss, model(**make_inputs()).loss)


def test_either_side_may_be_left_out(tiny_model):
    inputs = make_inputs()
    both = tiny_model(**inputs)
    images = tiny_model(pixel_values=inputs["pixel_values"])
    texts = tiny_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(images.image_embeds, both.image_embeds)
    assert torch.equal(texts.text_embeds, both.text_embeds)
    for single in (images, texts):
        assert single.loss is None
        assert single.logits_per_image is None
    with pytest.raises(ValueError, match="nothing to embed"):
        tiny_model()


PASSED_OVER = {"labels": torch.arange(3), "token_type_ids": torch.zeros(3, 4), "num_items_in_batch": torch.tensor(3)}


def test_what_trainer_and_collators_send_on_is_passed_over(tiny_model, tiny_config):
    inputs = make_inputs()
    with torch.no_grad():
        expected = tiny_model(**inputs).loss
        assert torch.equal(tiny_model(**inputs, **PASSED_OVER, inputs_embeds=None).loss, expected)
        for half, name in ((ClipMiniVisionModel, "pixel_values"), (ClipMiniTextModel, "input_ids")):
            one = half(tiny_config()).eval()
            assert torch.equal(one(inputs[name], **PASSED_OVER)[0], one(inputs[name])[0])


def test_an_argument_that_nobody_knows_is_named_with_those_there_are(tiny_model, tiny_config):
    inputs = make_inputs()
    with pytest.raises(TypeError, match=r"ClipMiniModel takes no argument 'pixels'; it takes input_ids, pixel_"):
        tiny_model(**inputs, pixels=1)
    with pytest.raises(TypeError, match=r"ClipMiniTextModel takes no argument 'pixel_values'; it takes input_ids"):
        ClipMiniTextModel(tiny_config())(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    for method in (tiny_model.get_text_features, tiny_model.get_image_features):
        with pytest.raises(TypeError, match="'labls'"):
            method(labls=1)


def test_trainer_predicts_embeddings_alone(tiny_model, tiny_config, tmp_path):
    inputs = make_inputs()
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(3)] * 2
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    predictions = Trainer(tiny_model, arguments).predict(rows).predictions
    assert [part.shape for part in predictions] == [(6, 16), (6, 16)]
    with torch.no_grad():
        assert np.allclose(predictions[0][:3], tiny_model(**inputs).text_embeds, atol=1e-6)
    half = ClipMiniVisionModel(tiny_config())
    alone = [{"pixel_values": row["pixel_values"]} for row in rows]
    assert Trainer(half, arguments).predict(alone).predictions.shape == (6, 16)


def test_tuples_have_the_documented_order(tiny_model):
    inputs = make_inputs()
    output = tiny_model(**inputs)
    as_tuple = tiny_model(**inputs, return_dict=False)
    for value, expected in zip(as_tuple, ("loss", "logits_per_image", "logits_per_text", "text_embeds"), strict=False):
        assert torch.equal(value, output[expected])


def test_features_are_projected_and_not_yet_normalized(tiny_model):
    inputs = make_inputs()
    features = tiny_model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(features, dim=-1), tiny_model(**inputs).image_embeds)
    assert not torch.allclose(features.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("text_pooling", ["mean", "cls", "last"])
def test_padding_does_not_change_an_embedding(text_pooling, tiny_config):
    model = ClipMiniModel(tiny_config(text_pooling=text_pooling)).eval()
    inputs = make_inputs()
    padded = model(input_ids=inputs["input_ids"][:1], attention_mask=inputs["attention_mask"][:1]).text_embeds
    bare = model(input_ids=inputs["input_ids"][:1, :4], attention_mask=torch.ones(1, 4)).text_embeds
    assert torch.allclose(padded, bare, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "masked", "whole"),
    [("mean", [2, 4], [34, 35]), ("cls", [1, 2], [1, 2]), ("last", [3, 6], [98, 97]), ("eos", [3, 6], [3, 6])],
)
def test_pooling_by_hand(pooling, masked, whole, tiny_model):
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [98.0, 97.0]]])
    ids = torch.tensor([[7, 9, 9]])  # the second token is the first that ends a text
    tiny_model.config.text_pooling, tiny_model.config.text_config.eos_token_id = pooling, 9
    assert tiny_model._pool_text(hidden, ids, torch.tensor([[1, 1, 0]])).tolist() == [masked]
    assert tiny_model._pool_text(hidden, ids, None).tolist() == [whole]


def test_padding_that_is_read_reaches_the_end(tiny_config):
    """It is the tower's, whatever the batch was padded with."""
    model = ClipMiniModel(tiny_config(text_padding_id=3)).eval()
    expected = model.text_model(input_ids=torch.tensor([[5, 6] + [3] * 62])).last_hidden_state.mean(dim=1)
    ids, mask = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    assert torch.allclose(model.pool_texts(ids, mask), expected, atol=1e-6)
    assert torch.equal(model.pool_texts(ids[:, :2]), model.pool_texts(ids, mask))


def test_a_text_tower_of_siglip(tiny_config, tmp_path):
    """AutoModel does not build it, and its head would stay unused."""
    tower = SiglipTextConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config = tiny_config(text_config=tower, text_pooling="last", text_padding_id=1, projection_bias=True)
    model = ClipMiniModel(config).eval()
    model.save_pretrained(tmp_path)
    loaded, info = ClipMiniModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = make_inputs()
    assert torch.equal(loaded.eval()(**inputs).text_embeds, model(**inputs).text_embeds)
    model.train()(**inputs).loss.backward()
    assert [name for name, parameter in model.text_model.named_parameters() if parameter.grad is None] == []
    assert model.text_projection.bias.grad is not None


def test_a_text_longer_than_the_tower_reads_is_cut(tiny_model):
    """As a tokenizer would: the closing token stays the last. What is short enough loses its padding alone."""
    long_ids = torch.randint(5, 60, (3, 100))
    mask = (torch.arange(100) < torch.tensor([100, 80, 20])[:, None]).long()
    cut = torch.cat([long_ids[:, :63], torch.stack([long_ids[0, 99:], long_ids[1, 79:80], long_ids[2, 63:64]])], dim=1)
    expected = tiny_model(input_ids=cut, attention_mask=mask[:, :64]).text_embeds
    assert torch.equal(tiny_model(input_ids=long_ids, attention_mask=mask).text_embeds, expected)
    cut = torch.cat([long_ids[:, :63], long_ids[:, 99:]], dim=1)
    assert torch.equal(tiny_model.pool_texts(long_ids), tiny_model.pool_texts(cut))


def test_the_loss_needs_as_many_images_as_captions(tiny_model):
    inputs = make_inputs()
    assert tiny_model(inputs["input_ids"][:2], inputs["pixel_values"]).loss is None
    assert tiny_model(**inputs, return_loss=False).loss is None


def test_pooled_features_stand_for_the_towers(tiny_model):
    inputs = make_inputs()
    pooled_image = tiny_model.pool_images(inputs["pixel_values"])
    pooled_text = tiny_model.pool_texts(inputs["input_ids"], inputs["attention_mask"])
    assert pooled_image.shape == (3, tiny_model.config.vision_embed_dim)
    output = tiny_model(pooled_image=pooled_image, pooled_text=pooled_text)
    assert torch.allclose(output.logits_per_image, tiny_model(**inputs).logits_per_image, atol=1e-6)


def test_the_temperature_is_clamped_and_finds_its_way_back(tiny_config):
    model = ClipMiniModel(tiny_config(logit_scale_max=20.0)).train()
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    assert model.eval().get_logit_scale().item() == pytest.approx(20.0)
    model.train()
    scale = model.get_logit_scale()
    assert scale.item() == pytest.approx(20.0)
    scale.backward()
    assert model.logit_scale.grad.item() == pytest.approx(20.0)  # clamped in place: the gradient is alive


def test_a_frozen_tower_stays_in_eval_mode(tiny_model):
    tiny_model.freeze_vision_tower()
    tiny_model.train()
    assert not any(module.training for module in tiny_model.vision_model.modules())
    assert tiny_model.text_model.training
    assert tiny_model.visual_projection.training
    statistics = tiny_model.vision_model.timm_model.bn1.running_mean.clone()
    tiny_model(**make_inputs())
    assert torch.equal(tiny_model.vision_model.timm_model.bn1.running_mean, statistics)
    trainable = {name.split(".")[0] for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert trainable == {"text_model", "text_projection", "visual_projection", "logit_scale"}


def test_gradient_checkpointing_reaches_both_towers_and_changes_no_gradient(tiny_config):
    torch.manual_seed(0)
    text_config = {**tiny_config().text_config.to_dict(), "dropout": 0.0, "attention_dropout": 0.0}
    model = ClipMiniModel(tiny_config(vision_config={"architecture": "test_vit"}, text_config=text_config)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.vision_model.timm_model.grad_checkpointing
    assert all(layer.gradient_checkpointing for layer in checkpointed.text_model.transformer.layer)
    for network in (model, checkpointed):
        network(**make_inputs(size=160)).loss.backward()
    for (name, p), q in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


@pytest.mark.parametrize(
    "architecture",
    [
        "resnet18",
        "vit_tiny_patch16_224",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224",
        "mobilenetv3_small_100",
        "tf_efficientnet_lite0",
    ],
)
def test_save_and_reload_is_exact(architecture, tiny_config, tmp_path):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(vision_config={"architecture": architecture})).eval()
    inputs = make_inputs(2, size=224)
    with torch.no_grad():
        expected = model(**inputs)
        model.save_pretrained(tmp_path)
        loaded, info = ClipMiniModel.from_pretrained(tmp_path, output_loading_info=True)
        # Weights are mapped from the file, and unaligned memory may get another kernel: compare like with like.
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data = tensor.data.clone()
        output = loaded(**inputs)
    assert not any(info.values())
    assert torch.equal(output.logits_per_image, expected.logits_per_image)
    assert torch.equal(output.image_embeds, expected.image_embeds)
    assert expected.image_embeds.isfinite().all()


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenetv3_small_100", "mobilenetv4_conv_small"])
def test_from_scratch_a_tower_starts_as_timm_starts_it(architecture, tiny_config):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(vision_config={"architecture": architecture})).eval()
    fresh = timm.create_model(architecture, num_classes=0)
    for (name, ours), theirs in zip(model.vision_model.timm_model.named_parameters(), fresh.parameters(), strict=True):
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.3, abs=0.01), name
    assert model.pool_images(torch.randn(2, 3, 224, 224)).std() > 1e-4  # alive


@pytest.fixture(scope="module")
def tower_folders(tmp_path_factory, tiny_config):
    """A timm folder as its Hub repositories look, and a DistilBERT folder; weights far from what `init` would draw."""
    vision, text = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("text")
    torch.manual_seed(3)
    timm_model = timm.create_model("test_resnet", num_classes=10)
    text_model = DistilBertModel(tiny_config().text_config)
    with torch.no_grad():
        for parameter in (*timm_model.parameters(), *text_model.parameters()):
            parameter.add_(torch.rand_like(parameter) + 1)
    timm.models.save_for_hf(timm_model, vision, safe_serialization=True)
    text_model.save_pretrained(text)
    return timm_model, text_model, str(vision), str(text)


def test_pretrained_towers_keep_every_weight(tower_folders, tmp_path):
    timm_model, text_model, vision, text = tower_folders
    model = ClipMiniModel.from_vision_text_pretrained(vision, text, projection_dim=8, loss="sigmoid")
    assert (model.config.projection_dim, model.config.loss) == (8, "sigmoid")
    assert not model.training
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert vision not in saved
    assert text not in saved
    for candidate in (model, ClipMiniModel.from_pretrained(tmp_path)):
        vision_state, text_state = candidate.vision_model.timm_model.state_dict(), candidate.text_model.state_dict()
        kept = {name: tensor for name, tensor in timm_model.state_dict().items() if not name.startswith("fc.")}
        assert vision_state.keys() == kept.keys()
        assert all(torch.equal(vision_state[name], tensor) for name, tensor in kept.items())
        assert all(torch.equal(text_state[name], tensor) for name, tensor in text_model.state_dict().items())


def test_a_vision_tower_that_is_not_timms_is_refused(tower_folders):
    _, _, _, text = tower_folders
    with pytest.raises(ValueError, match="not a timm model; name one"):
        ClipMiniModel.from_vision_text_pretrained(text, text)


def test_a_tower_with_missing_weights_is_refused(tower_folders, tmp_path):
    _, text_model, vision, _ = tower_folders
    state = {name: tensor for name, tensor in text_model.state_dict().items() if "layer.1.ffn" not in name}
    text_model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of its own model.*layer\.1\.ffn"):
        ClipMiniModel.from_vision_text_pretrained(vision, str(tmp_path))


def test_any_text_encoder_will_do(tiny_config):
    text_config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = ClipMiniModel(tiny_config(text_config=text_config)).eval()
    assert isinstance(model.text_model, BertModel)
    assert model(**make_inputs()).loss.isfinite()


def test_a_text_tower_with_positions_after_padding_and_a_pooler(tower_folders, tmp_path):
    """RoBERTa: saved from pretraining without a pooler, two positions fewer than the table has rows."""
    config = RobertaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=34,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "text")
    model = ClipMiniModel.from_vision_text_pretrained(tower_folders[2], str(tmp_path / "text"))
    assert model.config.max_text_tokens == 32
    assert model(input_ids=torch.full((2, 40), 7)).text_embeds.isfinite().all()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "model")
    _, info = ClipMiniModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())


def test_an_unknown_config_field_is_refused(tower_folders):
    with pytest.raises(ValueError, match="no field 'projektion'"):
        ClipMiniModel.from_vision_text_pretrained(tower_folders[2], tower_folders[3], projektion="mlp")


def test_a_half_saved_alone_does_not_claim_to_classify(tiny_folder, tmp_path):
    ClipMiniVisionModel.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_clipmini.ClipMiniVisionModel"
    assert "AutoModelForZeroShotImageClassification" not in auto_map


def test_single_towers_load_from_the_whole_checkpoint(tiny_folder):
    inputs = make_inputs()
    whole = ClipMiniModel.from_pretrained(tiny_folder)(**inputs)
    vision, vision_info = ClipMiniVisionModel.from_pretrained(tiny_folder, output_loading_info=True)
    text, text_info = ClipMiniTextModel.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(vision_info.values())
    assert not any(text_info.values())
    assert torch.equal(vision(inputs["pixel_values"]).image_embeds, whole.image_embeds)
    assert torch.equal(text(inputs["input_ids"], inputs["attention_mask"]).text_embeds, whole.text_embeds)
    assert not hasattr(vision, "text_model")
    assert not hasattr(text, "vision_model")


PEAK_MEMORY_PROBE = """
import re
from pathlib import Path
from transformers.dynamic_module_utils import get_class_from_dynamic_module
peak_mb = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
for name in ("ClipMiniVisionModel", "ClipMiniTextModel"):
    cls = get_class_from_dynamic_module(f"modeling_clipmini.{name}", sys.argv[1])
    before = peak_mb()
    model = cls.from_pretrained(sys.argv[1])
    sum(float(parameter.sum()) for parameter in model.parameters())  # a mapped file is read when it is touched
    print(peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_a_single_tower_does_not_read_the_other_ones_weights(tiny_config, tmp_path):
    text_config = {**tiny_config().text_config.to_dict(), "vocab_size": 1_000_000}  # 128 MB of word embeddings
    ClipMiniModel(tiny_config(text_config=text_config)).save_pretrained(tmp_path / "model")
    output = run_as_stranger(PEAK_MEMORY_PROBE, tmp_path, tmp_path / "model").stdout
    vision_growth_mb, text_growth_mb = map(float, output.split())
    assert text_growth_mb > 100  # the probe can see it
    assert vision_growth_mb < 50


def test_auto_classes_know_the_model(tiny_folder):
    assert type(AutoModel.from_pretrained(tiny_folder)) is ClipMiniModel


@pytest.mark.parametrize("architecture", ["mobilenetv3_small_100", "hgnetv2_b0", "ghostnet_100", "resnet18"])
def test_the_width_of_the_pooled_output_needs_no_forward(architecture, tiny_config):
    model = ClipMiniModel(tiny_config(vision_config=TimmWrapperConfig(architecture=architecture))).eval()
    assert isinstance(model.vision_model, TimmWrapperModel)
    pooled = model.pool_images(torch.zeros(1, 3, 224, 224))
    assert pooled.shape == (1, model.config.vision_embed_dim)
