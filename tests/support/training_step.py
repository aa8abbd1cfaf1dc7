"""One training step of a tiny model on one of several processes; leaves loss and gradients in a file.

Started by test_parallel.py: `training_step.py FOLDER OPTIONS SIZES`, with RANK and WORLD_SIZE in the environment as
torchrun sets them. SIZES are the pairs of each rank in a global batch that is the same for any number of processes.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from clipmini.training.arguments import ClipMiniTrainingArguments
from clipmini.training.build import character_tokenizer
from clipmini.training.trainer import ClipMiniTrainer
from modeling_clipmini import ClipMiniConfig, ClipMiniModel, ClipMiniProcessor

TEXT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}


def main():
    folder, options, sizes = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    config = ClipMiniConfig(
        vision_config={"architecture": "test_resnet"},
        text_config={**TEXT, "vocab_size": len(character_tokenizer()), "dropout": 0.0, "attention_dropout": 0.0},
        projection_dim=8,
        loss=options.pop("loss"),
        logit_scale_init_value=2.0,
    )
    trainer = ClipMiniTrainer(
        model=ClipMiniModel(config),
        args=ClipMiniTrainingArguments(output_dir=str(folder), use_cpu=True, eval_strategy="no", **options),
        processing_class=ClipMiniProcessor.from_towers(config, character_tokenizer()),
    )
    torch.manual_seed(1)
    total = sum(sizes)
    batch = {
        "pixel_values": torch.randn(total, 3, 64, 64),
        "input_ids": torch.randint(5, 40, (total, 6)),
        "attention_mask": (torch.arange(6) < torch.randint(2, 7, (total, 1))).long(),
        "image_ids": torch.tensor([7, 3, 7, 1, 3, 9, 7, 4])[:total],
        "rows": torch.arange(total),
    }
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank]) if len(sizes) == trainer.args.world_size else slice(None)
    model = trainer.accelerator.prepare(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(model, {name: rows[own] for name, rows in batch.items()})
    loss = trainer.accelerator.gather(loss.reshape(1)).mean()
    grads = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    save_file({"loss": loss.reshape(1), **grads}, folder / f"{trainer.args.world_size}-{rank}.safetensors")


if __name__ == "__main__":
    main()
