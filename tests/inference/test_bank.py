"""The bank: priors by hand, hubs that lose their place, and files that are damaged or of other weights."""

import logging
import math

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from clipmini.files import BANK_FILE, WEIGHTS_FILE
from clipmini.inference import bank as bank_module
from clipmini.inference.bank import Bank, load_bank
from clipmini.inference.encoders import load_encoder
from clipmini.publishing.folder import save_model_folder
from clipmini.publishing.push import prepare_push, push
from modeling_clipmini.modeling_clipmini import normalize


def random_rows(number, width=16, seed=0):
    return normalize(torch.randn(number, width, generator=torch.Generator().manual_seed(seed)))


def make_bank(texts, images=None, scale=10.0):
    images = texts if images is None else images
    return Bank(torch.as_tensor(texts).half(), torch.as_tensor(images).half(), scale)


def some_bank(model):
    return Bank(random_rows(5).half(), random_rows(3, seed=1).half(), model.get_logit_scale().item())


@pytest.fixture
def folder_with_bank(tiny_model, tmp_path):
    folder = tmp_path / "model"
    save_model_folder(tiny_model, folder, bank=some_bank(tiny_model))
    return folder


def rewrite(file, **changes):
    """Change facts or tensors of a saved bank; None removes one."""
    with safe_open(file, framework="pt") as opened:
        values = {**opened.metadata(), **{name: opened.get_tensor(name) for name in opened.keys()}, **changes}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, file, {name: value for name, value in values.items() if isinstance(value, str)})


def test_priors_are_soft_averages_of_cosines_by_hand():
    """Two images and two captions at right angles, scale 2: cosines are 0 and 1."""
    bank = make_bank([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], scale=2.0)
    mean = math.log((math.e**2 + 1) / 2) / 2
    expected = torch.tensor([mean, mean])
    torch.testing.assert_close(bank.prior_of_images(torch.eye(2)), expected)
    torch.testing.assert_close(bank.prior_of_texts(torch.eye(2)), torch.tensor([1.0, 0.0]))


def test_a_hub_loses_its_place():
    """The hub is nearest to the caption, but fits the captions of the bank better still."""
    images = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.8, 0.6]])
    caption = torch.tensor([0.6, 0.8, 0.0])
    bank = make_bank([[0.8, 0.6, 0.0], [0.8, 0.6, 0.0]])
    cosines = images @ caption
    torch.testing.assert_close(cosines, torch.tensor([0.96, 0.64]))
    scores = cosines - bank.prior_of_images(images)
    torch.testing.assert_close(scores, torch.tensor([0.96 - 1, 0.64 - 0.48]), atol=1e-3, rtol=0)


def test_a_bank_of_one_and_repeated_rows_give_the_plain_cosine():
    rows = random_rows(4)
    for copies in (1, 3):
        bank = make_bank(rows[:1].repeat(copies, 1))
        torch.testing.assert_close(bank.prior_of_images(rows), rows @ rows[0], atol=1e-3, rtol=0)


def test_the_prior_lies_between_mean_and_maximum_and_a_constant_changes_no_rank():
    images, texts, queries = random_rows(30), random_rows(50, seed=1), random_rows(20, seed=2)
    bank = make_bank(texts, images)
    prior, cosines = bank.prior_of_images(images), images @ texts.T
    assert (cosines.mean(dim=1) - 1e-3 <= prior).all()
    assert (prior <= cosines.max(dim=1).values + 1e-3).all()
    of_the_paper = torch.logsumexp(bank.scale * cosines, dim=1) / bank.scale
    torch.testing.assert_close(of_the_paper - prior, torch.full((30,), math.log(50) / bank.scale), atol=1e-3, rtol=0)
    augmented = torch.cat([images, -prior[:, None]], dim=1) @ torch.cat([queries, torch.ones(20, 1)], dim=1).T
    torch.testing.assert_close(augmented, images @ queries.T - prior[:, None])


def test_priors_in_blocks_are_those_in_one(monkeypatch):
    images, bank = random_rows(7), make_bank(random_rows(5, seed=1))
    whole = bank.prior_of_images(images)
    monkeypatch.setattr(bank_module, "MAX_SIMILARITIES", 10)
    torch.testing.assert_close(bank.prior_of_images(images), whole)
    assert bank.prior_of_images(images[:0]).shape == (0,)
    assert bank.prior_of_images(torch.full((1, 16), math.nan)).isnan().all()


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"The bank is 16 wide, and vectors are \(3, 8\)"):
        make_bank(random_rows(2)).prior_of_texts(random_rows(3, width=8))


def test_a_saved_bank_is_the_same_and_comes_with_the_encoder(folder_with_bank, tiny_folder, tiny_model):
    bank = load_bank(folder_with_bank)
    expected = some_bank(tiny_model)
    for loaded in (bank, load_encoder(folder_with_bank).bank):
        assert torch.equal(loaded.texts, expected.texts)
        assert torch.equal(loaded.images, expected.images)
        assert loaded.scale == expected.scale
    assert load_bank(tiny_folder) is None
    assert load_encoder(tiny_folder).bank is None
    modes = [(folder_with_bank / name).stat().st_mode for name in (BANK_FILE, WEIGHTS_FILE, "config.json")]
    assert len(set(modes)) == 1


def test_a_model_saved_without_a_bank_keeps_none_of_an_earlier_one(folder_with_bank, tiny_model):
    save_model_folder(tiny_model, folder_with_bank)
    assert not (folder_with_bank / BANK_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"texts": random_rows(5)}, "not rows of float16"),
        ({"texts": random_rows(5).half()[0]}, "not rows of float16"),
        ({"images": random_rows(0).half()}, "not rows of float16"),
        ({"images": random_rows(3, width=8).half()}, "16 wide, its images 8"),
        ({"images": random_rows(3).half() * math.nan}, "not all of length 1"),
        ({"images": random_rows(3).half() * 2}, "not all of length 1"),
        ({"images": None}, "images"),
        ({"scale": "nan"}, "not a number above 0"),
        ({"scale": "warm"}, "warm"),
        ({"scale": None}, "scale"),
        ({"weights_sha256": None}, "weights_sha256"),
    ],
)
def test_a_damaged_bank_is_one_clear_error_and_never_scores(folder_with_bank, changes, problem, caplog):
    rewrite(folder_with_bank / BANK_FILE, **changes)
    with pytest.raises(ValueError, match=r"bank.safetensors is damaged .*: delete it to score by cosine") as error:
        load_bank(folder_with_bank)
    assert problem in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert load_encoder(folder_with_bank).bank is None
    assert caplog.text.count("Scores are cosines") == 1


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_cut_bank_is_damaged(folder_with_bank, content):
    file = folder_with_bank / BANK_FILE
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="is damaged"):
        load_bank(folder_with_bank)


def test_the_bank_of_other_weights_is_refused(folder_with_bank, tiny_model, caplog):
    """As when a model is fine-tuned and saved into the same folder."""
    with torch.no_grad():
        next(tiny_model.parameters()).add_(1)
    tiny_model.save_pretrained(folder_with_bank)
    with pytest.raises(ValueError, match="is of other weights than those beside it"):
        load_bank(folder_with_bank)
    assert load_encoder(folder_with_bank).bank is None
    assert "of other weights" in caplog.text


def test_the_bank_of_a_hub_model_is_fetched(pushable_folder, tiny_model, hub):
    push(prepare_push(pushable_folder, "org/without"))
    assert load_bank("org/without") is None
    save_model_folder(
        tiny_model, pushable_folder, ModelCard.load(pushable_folder / "README.md"), some_bank(tiny_model)
    )
    push(prepare_push(pushable_folder, "org/with"))
    assert torch.equal(load_bank("org/with").texts, some_bank(tiny_model).texts)
    assert load_encoder("org/with").bank is not None
