import re

import pytest
import torch

from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.trainer import ClipMiniTrainer, NonFiniteLossError, check_finite


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


@pytest.mark.parametrize("loss", [0.0, -1e30, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.bfloat16)])
def test_a_finite_loss_passes(loss):
    check_finite(loss, 1, ["a.jpg"])


@pytest.mark.parametrize("loss", [float("nan"), float("-inf"), torch.tensor(float("inf"))])
def test_a_loss_that_is_not_finite_names_the_step_and_the_images(loss):
    with pytest.raises(NonFiniteLossError) as error:
        check_finite(loss, 7, [f"{number}.jpg" for number in range(8)])
    message = str(error.value)
    assert message.startswith(f"the loss is {float(loss)} at step 7, on the images 0.jpg, 1.jpg, ")
    assert "7.jpg; lower learning_rate" in message
    assert "max_grad_norm" in message
    assert "fp16" in message
    assert isinstance(error.value, ValueError)  # one sentence of the command


def test_of_many_images_the_first_are_named():
    with pytest.raises(NonFiniteLossError, match=r"6\.jpg, 7\.jpg and 3 more; lower"):
        check_finite(float("nan"), 7, [f"{number}.jpg" for number in range(11)])
    with pytest.raises(NonFiniteLossError, match="at step 7; lower"):
        check_finite(float("nan"), 7, [])
