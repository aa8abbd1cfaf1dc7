"""Train a clipmini model further, with transformers alone: clipmini itself is not needed.

    python finetune.py MODEL IMAGES --output_dir tuned --num_train_epochs 3 --learning_rate 1e-5 --license cc-by-4.0

MODEL is a folder or a Hub id; its code is run, so read it first. IMAGES is a folder with images and a metadata.csv of
the columns file_name and caption, one row for each image. Under torchrun each process has the negatives of its own
batch alone, since the plain Trainer gathers none; `torchrun -m clipmini.cli train` shares them all.
"""

from typing import Any

from datasets import load_dataset
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("model")
parser.add_argument("images")
parser.add_argument("--license", help="The tuned model's, as the Hub writes it; a push asks for it.")
arguments, own = parser.parse_args_into_dataclasses()
arguments.remove_unused_columns = False  # the model's forward knows no column of the data

model = AutoModel.from_pretrained(own.model, trust_remote_code=True)
model.freeze_batch_norm()  # the statistics of small batches would spoil the image tower, whatever the learning rate
processor = AutoProcessor.from_pretrained(own.model, trust_remote_code=True)
data = load_dataset("imagefolder", data_dir=own.images)


def collate(rows: list[dict[str, Any]]) -> Any:
    """Make a batch of pairs: row i of the images belongs to row i of the captions."""
    return processor(images=[row["image"] for row in rows], text=[row["caption"] for row in rows])


train_data, eval_data = data["train"], data.get("validation")
trainer = Trainer(model, arguments, collate, train_data, eval_data, processing_class=processor)
trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
trainer.save_model()  # weights, code and processor; files of other libraries are not copied
trainer.create_model_card(license=own.license, tags=["clipmini"])
