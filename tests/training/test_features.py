"""Features of frozen towers: computed once for each image and caption, whatever else changes in the data."""

import io
import multiprocessing
import signal
import sys
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from safetensors.numpy import load_file

from clipmini.data.scan import scan_images, scan_readable
from clipmini.files import cache_root
from clipmini.training import features as feature_module
from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.features import prepare_features
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.images_clipmini import ImageError, read_image


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """Prepare features, and count the views and the captions that the towers see."""
    seen = {"images": 0, "captions": 0}

    def counting(function, kind):
        def run(batch, *args, **kwargs):
            seen[kind] += len(batch)
            return function(batch, *args, **kwargs)

        return run

    tiny_model.pool_images = counting(tiny_model.pool_images, "images")
    tiny_model.pool_texts = lambda input_ids, attention_mask: counting(
        type(tiny_model).pool_texts.__get__(tiny_model), "captions"
    )(input_ids, attention_mask)

    def run(pairs, **options):
        seen.update(images=0, captions=0)
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "freeze_vision": True, "freeze_text": True}
        args = ClipMiniTrainingArguments(**{**defaults, **options})
        return prepare_features(tiny_model, {"train": pairs}, args)["train"], dict(seen)

    return run


def test_features_are_what_the_towers_give(prepare, tiny_model, toy_pairs):
    pairs, seen = prepare(toy_pairs)
    assert seen == {"images": 12, "captions": len(set(pairs.captions))}
    with torch.no_grad():
        pixels = tiny_model.processor(images=[read_image(image) for image in toy_pairs["image"]])["pixel_values"]
        images = tiny_model.pool_images(pixels)
        texts = tiny_model.pool_texts(**tiny_model.processor(text=pairs.captions))
    torch.testing.assert_close(torch.from_numpy(pairs.image_features[:, 0]), images)
    torch.testing.assert_close(torch.from_numpy(pairs.text_features[:]), texts)


def test_a_second_start_computes_nothing(prepare, toy_pairs):
    first, _ = prepare(toy_pairs)
    again, seen = prepare(toy_pairs)
    assert seen == {"images": 0, "captions": 0}
    np.testing.assert_array_equal(again.image_features[:], first.image_features[:])
    np.testing.assert_array_equal(again.text_features[:], first.text_features[:])


@pytest.mark.parametrize("options", [{}, {"augment": {}, "num_views": 3}])
def test_an_added_image_costs_itself_wherever_it_stands(prepare, toy_pairs, options):
    before, _ = prepare(toy_pairs.select(range(11)), **options)
    moved = concatenate_datasets([toy_pairs.select([11]), toy_pairs.select(range(11))])
    after, seen = prepare(moved, **options)
    assert seen["images"] == options.get("num_views", 1)
    assert seen["captions"] <= 2
    np.testing.assert_array_equal(after.image_features[1:], before.image_features[:])


def test_another_caption_costs_itself_and_no_view(prepare, toy_pairs):
    options = {"augment": {}, "num_views": 2}
    prepare(toy_pairs, **options)
    changed = toy_pairs.map(lambda row: {"captions": [*row["captions"][:-1], "something new"]})
    _, seen = prepare(changed, **options)
    assert seen == {"images": 0, "captions": 1}


def test_a_side_in_a_caption_costs_the_views_that_are_mirrored_no_more(prepare, toy_pairs):
    options = {"augment": {}, "num_views": 2}
    prepare(toy_pairs, **options)
    changed = toy_pairs.map(lambda row, number: {"captions": ["on the left"] * (number == 3) or row["captions"]}, True)
    assert prepare(changed, **options)[1]["images"] == 2


def test_a_larger_number_of_views_costs_the_new_ones(prepare, toy_pairs):
    before, _ = prepare(toy_pairs, augment={}, num_views=2)
    after, seen = prepare(toy_pairs, augment={}, num_views=5)
    assert seen["images"] == 12 * 3
    np.testing.assert_array_equal(after.image_features[:, :2], before.image_features[:])


def test_copies_of_an_image_share_a_row(prepare, toy_pairs):
    _, seen = prepare(concatenate_datasets([toy_pairs, toy_pairs]))
    assert seen["images"] == 12


def test_other_weights_or_pixels_are_computed_anew(prepare, tiny_model, toy_pairs):
    prepare(toy_pairs)
    assert prepare(toy_pairs, augment={}, num_views=1)[1] == {"images": 12, "captions": 0}
    assert prepare(toy_pairs, augment={"crop_scale": 0.5})[1] == {"images": 12, "captions": 0}


@pytest.mark.parametrize(("tower", "seen_anew"), [("vision_model", "images"), ("text_model", "captions")])
def test_a_tower_with_other_weights_computes_its_features_anew_and_the_other_does_not(
    prepare, tiny_model, toy_pairs, tower, seen_anew
):
    before, _ = prepare(toy_pairs)
    list(getattr(tiny_model, tower).parameters())[-1].data += 1
    after, seen = prepare(toy_pairs)
    assert {kind for kind, number in seen.items() if number} == {seen_anew}
    is_same = {
        "images": np.array_equal(after.image_features[:], before.image_features[:]),
        "captions": np.array_equal(after.text_features[:], before.text_features[:]),
    }
    assert is_same == {"images": seen_anew != "images", "captions": seen_anew != "captions"}


def test_another_pooling_of_captions_is_computed_anew(prepare, tiny_model, toy_pairs):
    pairs, _ = prepare(toy_pairs)
    before, tiny_model.config.text_pooling = pairs.text_features[:], "cls"
    after, seen = prepare(toy_pairs)
    assert seen == {"images": 0, "captions": len(set(pairs.captions))}
    assert not np.array_equal(after.text_features[:], before)


def test_activations_are_those_of_the_frozen_stages_and_do_not_care_for_the_trained_ones(
    prepare, tiny_model, toy_pairs
):
    options = {"freeze_vision": False, "freeze_text": False, "vision_stages": 2}
    rows, _ = prepare(toy_pairs, **options)
    before = rows.image_features[:]
    num_files = len(list(cache_root().rglob("*.safetensors")))
    timm_model = tiny_model.vision_model.timm_model
    list(timm_model.parameters())[-1].data += 1
    np.testing.assert_array_equal(prepare(toy_pairs, **options)[0].image_features[:], before)
    assert len(list(cache_root().rglob("*.safetensors"))) == num_files
    next(timm_model.parameters()).data[0] += 1
    assert not np.array_equal(prepare(toy_pairs, **options)[0].image_features[:], before)


@pytest.mark.parametrize("options", [{}, {"freeze_vision": False, "freeze_text": False, "vision_stages": 2}])
def test_another_side_tower_is_computed_anew(tiny_config, tiny_processor, toy_pairs, tmp_path, options):
    args = ClipMiniTrainingArguments(
        **{"output_dir": str(tmp_path), "use_cpu": True, "freeze_vision": True, "freeze_text": True, **options}
    )
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(side_vision_config={"architecture": "test_convnext"}))
    model.processor = tiny_processor
    before = prepare_features(model, {"train": toy_pairs}, args)["train"].image_features[:]
    list(model.vision_model.side.parameters())[-1].data += 1
    after = prepare_features(model, {"train": toy_pairs}, args)["train"].image_features[:]
    assert before.shape == after.shape
    assert not np.array_equal(before, after)


def test_activations_to_measure_with_are_not_rounded(tiny_model, toy_pairs, tmp_path):
    args = ClipMiniTrainingArguments(output_dir=str(tmp_path), use_cpu=True, vision_stages=2)
    prepared = prepare_features(tiny_model, {"train": toy_pairs, "validation": toy_pairs}, args)
    assert prepared["train"].image_features.dtype == np.float16
    pixels = tiny_model.processor(images=[read_image(image) for image in toy_pairs["image"]])["pixel_values"]
    activations = prepared["validation"].frozen_stages.run(pixels).numpy()
    np.testing.assert_allclose(prepared["validation"].image_features[:, 0], activations, atol=1e-6)


def test_batches_and_workers_change_nothing(prepare, toy_pairs, monkeypatch):
    options = {"augment": {}, "num_views": 2}
    expected, _ = prepare(toy_pairs, **options)
    monkeypatch.setenv("CLIPMINI_CACHE", str(cache_root() / "other"))
    monkeypatch.setattr(feature_module, "IMAGE_CHUNK", 5)
    monkeypatch.setattr(feature_module, "CAPTION_CHUNK", 3)
    other, seen = prepare(toy_pairs, **options, per_device_eval_batch_size=3, dataloader_num_workers=2)
    assert seen["images"] == 24
    np.testing.assert_allclose(other.image_features[:], expected.image_features[:], atol=1e-5)
    np.testing.assert_allclose(other.text_features[:], expected.text_features[:], atol=1e-5)


def test_a_run_that_is_interrupted_loses_a_chunk(prepare, tiny_model, toy_pairs, monkeypatch):
    monkeypatch.setattr(feature_module, "IMAGE_CHUNK", 4)
    calls, pool = [], tiny_model.pool_images

    def failing(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pool(pixels)

    tiny_model.pool_images = failing
    with pytest.raises(KeyboardInterrupt):
        prepare(toy_pairs)
    tiny_model.pool_images = pool
    assert prepare(toy_pairs)[1]["images"] == 4


def test_nothing_is_cached_where_nothing_is_frozen(prepare, toy_pairs):
    pairs, seen = prepare(toy_pairs, freeze_vision=False, freeze_text=False)
    assert (pairs.image_features, pairs.text_features) == (None, None)
    assert seen == {"images": 0, "captions": 0}


def test_the_model_is_left_in_its_mode(prepare, tiny_model, toy_pairs):
    tiny_model.train()
    modes = [module.training for module in tiny_model.modules()]
    prepare(toy_pairs)
    assert [module.training for module in tiny_model.modules()] == modes
    assert isinstance(tiny_model, ClipMiniModel)


def test_an_image_that_changes_after_the_scan_is_not_kept_for_the_old_one(prepare, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(png_of(1))
    pairs = Dataset.from_list([{"image": {"bytes": None, "path": str(file)}, "captions": ["a"], "image_id": 5}])
    facts = scan_readable(pairs)
    monkeypatch.setattr(feature_module, "scan_readable", lambda rows: facts)
    file.write_bytes(png_of(2))
    with pytest.raises(ImageError, match=r"image_id 5: has changed since it was scanned"):
        prepare(pairs)


def test_an_unreadable_image_is_named(prepare, tmp_path):
    rows = [
        {"image": {"bytes": data, "path": None}, "captions": ["a"], "image_id": number}
        for number, data in enumerate([png_of(1), b"no image"])
    ]
    with pytest.raises(ImageError, match="image_id 1: is not an image"):
        prepare(Dataset.from_list(rows))


def fill(model, pairs, folder, log):
    """Fill the store in a process of its own, and write down every image that the tower has seen."""

    def pool(pixels):
        with log.open("a") as file:
            file.write("x" * len(pixels))
        time.sleep(0.02)
        return type(model).pool_images(model, pixels)

    model.pool_images = pool
    args = ClipMiniTrainingArguments(output_dir=str(folder), use_cpu=True, freeze_vision=True)
    prepare_features(model, {"train": pairs}, args)


@pytest.mark.slow
def test_thirty_kills_lose_at_most_a_chunk_each(tiny_model, tmp_path, monkeypatch):
    chunk, seed = 4, time.time_ns()
    sys.stdout.write(f"seed {seed}\n")  # pytest shows it if the test fails
    random = np.random.default_rng(seed)
    monkeypatch.setattr(feature_module, "IMAGE_CHUNK", chunk)
    rows = [
        {"image": {"bytes": png_of(number), "path": None}, "captions": ["a"], "image_id": number}
        for number in range(3000)
    ]
    pairs = Dataset.from_list(rows)
    scan_images(pairs)
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    num_kills = stored = seen = 0
    while num_kills < 30:
        child = context.Process(target=fill, args=(tiny_model, pairs, tmp_path / "run", log))
        child.start()
        time.sleep(random.uniform(0.3, 0.7))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it was done before it was killed: there are too few images"
        now_seen, now_stored = len(log.read_text()) if log.exists() else 0, num_stored()
        assert now_seen - seen - (now_stored - stored) <= chunk
        seen, stored, num_kills = now_seen, now_stored, num_kills + 1
    child = context.Process(target=fill, args=(tiny_model, pairs, tmp_path / "run", log))
    child.start()
    child.join()
    assert num_stored() == 3000
    assert len(log.read_text()) <= 3000 + 30 * chunk


def png_of(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def num_stored():
    """Count the images' rows in the store, apart from those of the scan."""
    files = [file for file in cache_root().rglob("*.safetensors") if not file.name.startswith(".")]
    rows = [load_file(file)["rows"] for file in files]
    return sum(len(row) for row in rows if row.dtype == np.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_features_are_computed_on_the_gpu_and_agree_with_the_cpu(prepare, tiny_model, toy_pairs, monkeypatch):
    expected, _ = prepare(toy_pairs)
    monkeypatch.setenv("CLIPMINI_CACHE", str(cache_root() / "gpu"))
    pairs, seen = prepare(toy_pairs, use_cpu=False)
    assert tiny_model.device.type == "cuda"
    assert seen["images"] == 12
    np.testing.assert_allclose(pairs.image_features[:], expected.image_features[:], atol=1e-2)
    np.testing.assert_allclose(pairs.text_features[:], expected.text_features[:], atol=1e-2)
