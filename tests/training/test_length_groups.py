import pytest
import torch

from clipmini.training.batches import pool_by_length

CAPTIONS = ["a red square", "b", "a much longer caption about a green disc", "blue bar", "c"]


@pytest.mark.parametrize("num_groups", [1, 2, 4, 5, 9])
def test_groups_give_what_the_whole_batch_gives(tiny_model, tiny_processor, num_groups):
    batch = tiny_processor(text=CAPTIONS)
    whole = tiny_model.pool_texts(**batch)
    grouped = pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], num_groups)
    torch.testing.assert_close(grouped, whole, atol=1e-6, rtol=1e-5)


def test_each_group_is_padded_to_its_own_longest(tiny_model, tiny_processor, monkeypatch):
    shapes = []
    pool_texts = tiny_model.pool_texts

    def noting(input_ids, attention_mask):
        shapes.append(tuple(input_ids.shape))
        return pool_texts(input_ids, attention_mask)

    monkeypatch.setattr(tiny_model, "pool_texts", noting)
    batch = tiny_processor(text=CAPTIONS)
    lengths = sorted(batch["attention_mask"].sum(dim=1).tolist())
    pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], 2)
    assert shapes == [(3, lengths[2]), (2, lengths[4])]


def test_every_caption_gets_its_gradient(tiny_model, tiny_processor):
    batch = tiny_processor(text=CAPTIONS)
    weights = torch.rand(len(CAPTIONS), tiny_model.config.text_config.hidden_size)
    gradients = []
    for pooled in (
        tiny_model.pool_texts(**batch),
        pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], 3),
    ):
        tiny_model.zero_grad()
        (pooled * weights).sum().backward()
        gradients.append(tiny_model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
