import pytest
import torch

from clipmini.training.gradient_cache import cached_backward, check_batch_norm
from modeling_clipmini import ClipMiniModel, infonce_loss


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = ClipMiniModel(tiny_config(projection="mlp", projection_dropout=0.5))
    model.freeze_batch_norm()
    return model.train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(7, 3, 64, 64, generator=generator),
        "input_ids": torch.randint(5, 60, (7, 6), generator=generator),
    }


IDS = torch.tensor([4, 2, 4, 1, 5, 2, 9])


def embed_with(model):
    def embed(rows):
        output = model(**rows, return_logits=False)
        return output.image_embeds, output.text_embeds

    return embed


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_gradients(model, batch, chunk_size):
    """The graph of the whole batch at once, embedded in the same chunks so that dropout draws the same."""
    torch.manual_seed(5)
    rows = [{k: v[i : i + chunk_size] for k, v in batch.items()} for i in range(0, 7, chunk_size)]
    images, texts = (torch.cat(side) for side in zip(*map(embed_with(model), rows), strict=True))
    loss = infonce_loss(images, texts, model.get_logit_scale().detach(), IDS)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_it_gives_the_gradient_of_the_whole_batch_with_dropout(model, batch, chunk_size):
    expected_loss, expected = plain_gradients(model, batch, chunk_size)
    torch.manual_seed(5)
    scale = model.get_logit_scale().detach()
    loss = cached_backward(embed_with(model), lambda i, t: infonce_loss(i, t, scale, IDS), batch, chunk_size)
    found = gradients(model)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert found.keys() == expected.keys()
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


def test_it_leaves_the_random_state_where_one_pass_leaves_it(model, batch):
    torch.manual_seed(5)
    with torch.no_grad():
        embed_with(model)(batch)
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(5)
    cached_backward(embed_with(model), lambda i, t: (i * t).sum(), batch, 7)
    assert torch.equal(torch.get_rng_state(), after_one_pass)


def test_only_the_last_chunk_synchronizes_and_brings_the_rest(model, batch):
    from contextlib import contextmanager

    entered = []

    @contextmanager
    def no_sync():
        entered.append(True)
        yield

    cached_backward(
        embed_with(model),
        lambda i, t: (i * t).sum(),
        batch,
        3,
        no_sync=no_sync,
        last=lambda: 2 * model.logit_scale,
    )
    assert len(entered) == 2
    assert model.logit_scale.grad.item() == pytest.approx(2)


def test_batch_norm_in_train_mode_is_refused_with_the_reason(tiny_model):
    with pytest.raises(ValueError, match=r"gradient_cache_chunk .*conv1.1 normalizes.*freeze_batch_norm: true"):
        check_batch_norm(tiny_model.train())
    tiny_model.freeze_batch_norm()
    check_batch_norm(tiny_model.train())
