"""Fine-tune a saved clipmini model with transformers alone; clipmini need not be installed.

    python finetune.py MODEL IMAGES --output_dir tuned --num_train_epochs 3 --learning_rate 1e-5 --license cc-by-4.0

MODEL is a folder or a Hub id; its code is run, so read it first. IMAGES is a folder with images and a metadata.csv,
which has the columns file_name and caption and one row for each image. Under torchrun, each process sees only the
negatives of its own batch, since the plain Trainer does not gather them; `torchrun -m clipmini.cli train` does.
"""

from typing import Any

from datasets import load_dataset
from transformers import AutoModel, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

parser = HfArgumentParser(TrainingArguments)
parser.add_argument("model")
parser.add_argument("images")
parser.add_argument("--license", help="License of the tuned model, as the Hub spells it; needed for a push.")
arguments, options = parser.parse_args_into_dataclasses()
arguments.remove_unused_columns = False  # its columns are not arguments of the model's forward

model = AutoModel.from_pretrained(options.model, trust_remote_code=True)
model.freeze_batch_norm()  # the statistics of small batches would spoil the image tower, whatever the learning rate
processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
data = load_dataset("imagefolder", data_dir=options.images)


def collate(rows: list[dict[str, Any]]) -> Any:
    """Build a batch of pairs: row i of the images belongs to row i of the captions."""
    return processor(images=[row["image"] for row in rows], text=[row["caption"] for row in rows])


train_data, eval_data = data["train"], data.get("validation")
trainer = Trainer(model, arguments, collate, train_data, eval_data, processing_class=processor)
trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
trainer.save_model()  # weights, code and processor, but no files of other libraries
trainer.create_model_card(license=options.license, tags=["clipmini"])
