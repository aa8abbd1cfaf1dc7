"""The recipe `article`, with random towers from folders here, on Flickr8k as Kaggle and its authors lay it out."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import DistilBertConfig, DistilBertModel

import clipmini
from clipmini.recipe_files import find_preset, read_yaml
from clipmini.training.build import character_tokenizer
from clipmini.training.recipes import load_recipe

COLORS = ("red", "green", "blue", "white")


def write_flickr8k(folder, layout):
    """Twenty images with five captions each, without splits."""
    images = folder / {"kaggle": "Images", "original": "Flicker8k_Dataset"}[layout]
    images.mkdir(parents=True)
    lines = {"kaggle": ["image,caption"], "original": []}[layout]
    for number in range(20):
        color, name = COLORS[number % 4], f"{number:04}_ab.jpg"
        Image.new("RGB", (60 + number, 40), color).save(images / name)
        for index in range(5):
            caption = f"A {color} wall , seen {index} times ."
            lines.append(f'{name},"{caption}"' if layout == "kaggle" else f"{name}#{index}\t{caption}")
    file = folder / {"kaggle": "captions.txt", "original": "Flickr8k.token.txt"}[layout]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_towers(folder, architecture, **text):
    """Random towers in folders, and the article's preset with these in place of the Hub's."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    save_for_hf(timm.create_model(architecture, pretrained=False), str(folder / "vision"), safe_serialization=True)
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **text)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    preset = dict(read_yaml(find_preset("models", "resnet50-distilbert")))
    preset |= {"vision": str(folder / "vision"), "text": str(folder / "text")}
    file = folder / "model.yaml"
    file.write_text(json.dumps(preset), encoding="utf-8")
    return file


def check_article(run, towers):
    """The heads are the article's, and every part has learned something."""
    model = run.model()
    assert (model.config.projection, model.config.projection_dim, model.config.text_pooling) == ("mlp", 256, "cls")
    assert model.encode_text("a red wall").shape == (256,)
    size = model.processor.image_processor.crop_size
    assert (size["height"], size["width"]) == (224, 224)
    for tower, name in ((model.vision_model, "vision"), (model.text_model, "text")):
        before = load_file(towers.parent / name / "model.safetensors")
        after = {key.removeprefix("timm_model."): value.cpu() for key, value in tower.named_parameters()}
        moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
        assert len(moved) > 0.7 * len(after)  # a random residual block passes on no gradient at its first step
    assert run.results["num_train_captions"] == 5 * run.results["num_train_images"]
    assert set(run.results["splits"]) == {"validation", "test"}


@pytest.mark.parametrize("layout", ["kaggle", "original"])
def test_it_trains_both_towers_under_heads_of_256(layout, tmp_path):
    towers = write_towers(tmp_path, "test_resnet", dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    options = {"model": towers, "num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    source = write_flickr8k(tmp_path / "flickr8k", layout)
    run = clipmini.train("article", source=source, output_dir=tmp_path / "run", **options)
    check_article(run, towers)
    assert run.example.folder.startswith(str(source))


@pytest.mark.slow
def test_it_trains_towers_of_the_real_size(tmp_path):
    towers = write_towers(tmp_path, "resnet50")
    options = {"model": towers, "max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True}
    source = write_flickr8k(tmp_path / "flickr8k", "kaggle")
    run = clipmini.train("article", source=source, output_dir=tmp_path / "run", eval_steps=3, save_steps=3, **options)
    check_article(run, towers)


def test_its_rates_are_those_of_the_article():
    recipe = load_recipe("article", {"source": "flickr8k"})
    args, model = recipe.training, recipe.model
    assert (args.learning_rate, args.vision_learning_rate, args.text_learning_rate) == (1e-3, 1e-4, 1e-5)
    assert (args.weight_decay, args.per_device_train_batch_size) == (1e-3, 32)
    assert args.lr_scheduler_kwargs == {"mode": "max", "factor": 0.8, "patience": 1}
    assert (model.vision, model.text) == ("timm/resnet50.a1_in1k", "distilbert/distilbert-base-uncased")
