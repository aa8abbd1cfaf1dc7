"""What a run can be told: training arguments and the recipe that holds them together with model and data."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class ClipMiniTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what contrastive training of two towers adds, and defaults that fit it.

    Attributes:
        vision_learning_rate: peak learning rate of the vision tower; `learning_rate`, that of the heads, by default.
        text_learning_rate: peak learning rate of the text tower; `learning_rate` by default.
        freeze_vision: train the vision tower's projection but not the tower.
        freeze_text: train the text tower's projection but not the tower.
        cache_features: compute a frozen tower's outputs once, before training, and keep them in memory.
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower; by default `learning_rate`."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the text tower; by default `learning_rate`."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Train only the projection of the vision tower."})
    freeze_text: bool = field(default=False, metadata={"help": "Train only the projection of the text tower."})
    cache_features: bool = field(
        default=True, metadata={"help": "Compute a frozen tower's outputs once, before training."}
    )
    # The collator needs image and captions, which `forward` does not take.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off: the collator needs all."})
    # A last batch of a few pairs has a handful of negatives and a gradient unlike the others'.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last batch if it is not full."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure retrieval on validation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(
        default="eval_mean_recall", metadata={"help": "What best means; the loss would depend on the batch size."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Pictures per forward when embedding."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trainer integrations to log to."})

    def __post_init__(self) -> None:
        """Check and complete the arguments as `TrainingArguments` does."""
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinned memory is there for a GPU; without one torch warns per epoch
        super().__post_init__()


@dataclass
class DataArguments:
    """Where the pairs of a run come from; see `load_pairs`.

    Attributes:
        source: a folder, a table, a Flickr token file or a Hub data set id.
        image_column: the column that holds pictures, paths or bytes; found by itself if left out.
        caption_column: the column that holds captions; found by itself if left out.
        image_root: the folder that paths in a table are relative to; the table's own by default.
        validation_fraction: share of the images to validate on, where the data has no such split.
        test_fraction: share of the images to test on, where the data has neither split.
        split_seed: seed of the split.
        check_images: open every picture once before training and leave out those that cannot be read.
        strict: stop at the first picture or caption that cannot be used, rather than leave it out.
    """

    source: str
    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    check_images: bool = True
    strict: bool = False
