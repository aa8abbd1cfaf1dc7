"""What a run can be told: the `training` and `data` sections of a recipe."""

import logging
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .metrics import METRIC_NAMES

logger = logging.getLogger(__name__)

AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


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
        """Check and complete the arguments as `TrainingArguments` does.

        Raises:
            ValueError: a value that cannot work; the message names the field and what is allowed.
        """
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; use at least 1.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs:g} is not allowed; use a number above 0.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take pictures and captions away; leave it out.")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.load_best_model_at_end = False  # nothing is measured to choose by
        best = self.metric_for_best_model
        if self.load_best_model_at_end and (best or "").removeprefix("eval_") not in METRIC_NAMES:
            raise ValueError(f"metric_for_best_model={best!r} is not measured; use one of {', '.join(METRIC_NAMES)}.")
        for tower in ("vision", "text"):
            if getattr(self, f"freeze_{tower}") and getattr(self, f"{tower}_learning_rate") is not None:
                logger.warning("%s_learning_rate has no effect: freeze_%s is on", tower, tower)
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
        check_images: open every picture once before training and leave out those that cannot be read. Without it
            the first such picture stops the run.
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
