"""Whether a model can read what it is asked for, and tell labels apart."""

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import DistilBertTokenizer, PreTrainedTokenizerFast

import clipmini
from clipmini.inference.prompts import check_distinct, describe_unreadable

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "ძ", "##ა", "##ღ", "##ლი"]


@pytest.fixture
def tokenizer():
    return DistilBertTokenizer(vocab={piece: index for index, piece in enumerate(PIECES)})


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["a dog", "dogs"], None),  # "##s" is a letter of Latin
        (["a dog a 狗"], None),  # one token of four
        ([], None),
        (["狗"], "1 of 1 queries (100%), such as '狗': a third"),
        (["a dog", "a dog 狗"], "1 of 2 queries (50%), such as 'a dog 狗': a third"),
        (["a dog", "a 狗", "狗 鱼"], "2 of 3 queries (67%), such as 'a 狗': a third"),
        (["ძაღ"], "1 of 1 queries (100%), such as 'ძაღ': a third"),  # ძ ##ა ##ღ
        (["狗" * 100], f"1 of 1 queries (100%), such as '{'狗' * 60}': a third"),
    ],
)
def test_texts_that_cannot_be_read(tokenizer, texts, share):
    message = describe_unreadable(tokenizer, texts, "queries")
    assert (message is None) if share is None else (f"cannot read {share}" in message)


def test_a_few_such_texts_are_ordinary_in_large_data(tokenizer):
    assert describe_unreadable(tokenizer, ["狗"] + ["a dog"] * 19, "captions", allowed_share=0.05) is None
    assert "1 of 19" in describe_unreadable(tokenizer, ["狗"] + ["a dog"] * 18, "captions", allowed_share=0.05)


def test_texts_are_counted_over_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("clipmini.inference.prompts.TOKENIZED_AT_ONCE", 2)
    assert "3 of 5" in describe_unreadable(tokenizer, ["狗", "dog", "狗", "dog", "狗"], "captions")


def test_tokenizers_without_unknown_tokens_read_everything(tokenizer):
    vocab = {byte: index for index, byte in enumerate(["<|endoftext|>", *ByteLevel.alphabet()])}
    pieces = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<|endoftext|>"))
    pieces.pre_tokenizer = ByteLevel()
    by_bytes = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<|endoftext|>")  # as CLIP's
    assert describe_unreadable(by_bytes, ["一只狗", "ძაღака"], "queries") is None
    assert describe_unreadable(None, ["一只狗"], "queries") is None
    tokenizer.unk_token = None
    assert describe_unreadable(tokenizer, ["dog"], "queries") is None


@pytest.mark.parametrize("labels", [["a dog", "a", "A Dog"], ["狗", "dog", "鱼"], ["dóg", "dog"]])
def test_labels_that_are_one_text_to_the_model_are_refused(tokenizer, labels):
    with pytest.raises(ValueError, match=rf"{labels[0]!r} and {labels[-1]!r} are one text") as caught:
        check_distinct(tokenizer, labels)
    assert "leave one out" in str(caught.value)
    check_distinct(tokenizer, labels[:-1])
    check_distinct(None, labels)


class TestWholeCommands:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, color in (("Fox", "red"), ("fox", "blue")):
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), color).save(tmp_path / "images" / name / "image.png")
        return tmp_path / "images"

    def told(self, caplog):
        found = [message for message in caplog.messages if "cannot read" in message]
        caplog.clear()
        return found

    def test_search(self, tiny_folder, folder, caplog):
        for use_index in (True, False):
            clipmini.search(tiny_folder, folder, "a fox", minus=["a dog"], use_index=use_index)
            assert self.told(caplog) == []
            clipmini.search_each(tiny_folder, folder, ["a fox", "狐狸"], use_index=use_index)
            (message,) = self.told(caplog)
            assert "1 of 2 queries (50%), such as '狐狸': a third or more of their tokens are unknown" in message

    def test_classify(self, tiny_folder, folder, caplog):
        image = folder / "Fox" / "image.png"
        clipmini.classify(tiny_folder, image, ["a fox", "狐"])
        assert len(self.told(caplog)) == 1
        with pytest.raises(ValueError, match="'Fox' and 'fox' are one text"):
            clipmini.classify(tiny_folder, image, ["Fox", "fox"])

    def test_zero_shot(self, tiny_folder, folder):
        with pytest.raises(ValueError, match="'Fox' and 'fox' are one text"):
            clipmini.evaluate(tiny_folder, folder, "zero-shot")

    def test_retrieval(self, tiny_folder, folder, caplog):
        lines = ["file_name,caption,split", "Fox/image.png,狐狸,test", "fox/image.png,a fox,test"]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
        clipmini.evaluate(tiny_folder, folder, check_leaks=False)
        (message,) = self.told(caplog)
        assert "1 of 2 captions" in message
