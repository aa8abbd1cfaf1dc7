"""Train a clipmini model further, with transformers alone: clipmini itself is not needed.

    python finetune.py MODEL PICTURES --output_dir tuned --num_train_epochs 3 --learning_rate 1e-5

MODEL is a folder or a Hub id; its code is run, so read it first. PICTURES is a folder with pictures and a metadata.csv
of the columns file_name and caption, one row for each picture. All of TrainingArguments can be given.
"""

from typing import Any

from datasets import load_dataset
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

arguments, (name, pictures) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    return_remaining_strings=True
)
arguments.remove_unused_columns = False  # the model's forward knows no column of the data

model = AutoModel.from_pretrained(name, trust_remote_code=True)
model.freeze_batch_norm()  # the statistics of small batches would spoil the image tower, whatever the learning rate
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
data = load_dataset("imagefolder", data_dir=pictures)


def collate(rows: list[dict[str, Any]]) -> Any:
    """Make a batch of pairs: row i of the pictures belongs to row i of the captions."""
    return processor(images=[row["image"] for row in rows], text=[row["caption"] for row in rows])


trainer = Trainer(
    model,
    arguments,
    data_collator=collate,
    train_dataset=data["train"],
    eval_dataset=data.get("validation"),
    processing_class=processor,
)
trainer.train()
trainer.save_model()  # weights, code and processor; a card, and files of other libraries, are not copied
