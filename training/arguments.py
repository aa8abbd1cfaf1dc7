"""The options of training: the `training` section of a recipe."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, unset_hf_deepspeed_config

from clipmini.data.augment import ImageAugmentation
from clipmini.evaluation.retrieval import METRIC_NAMES
from clipmini.inference.teacher import Teacher
from clipmini.names import first_sentence
from clipmini.recipe_files import build_section, field_names

from .lora import TOWERS, Lora
from .objective import HardNegatives

logger = logging.getLogger(__name__)

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_cache_chunk",
    "num_views",
    "length_groups",
    "vision_stages",
)


@dataclass
class ClipMiniTrainingArguments(TrainingArguments):
    """Extend `TrainingArguments` by the options of contrastive training, with defaults that fit it.

    The `help` of each field says what it means. `label_smoothing_factor` is InfoNCE's: the share of the target that is
    spread over all candidates of a batch.
    """

    # What is trained
    freeze_vision: bool = field(default=False, metadata={"help": "Freeze the vision tower and train its projection."})
    freeze_text: bool = field(default=False, metadata={"help": "Freeze the text tower and train its projection."})
    vision_stages: int | None = field(
        default=None,
        metadata={"help": "Train only the last n stages, as timm counts them, of the first vision tower; else all."},
    )
    freeze_batch_norm: bool = field(
        default=True, metadata={"help": "Keep the pretrained BatchNorm statistics of the vision tower."}
    )
    lora: Any = field(
        default=None,
        metadata={"help": "Train low-rank updates of towers instead of the towers: {parts: [vision, text], rank: 8}."},
    )

    # How fast
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower; by default `learning_rate`."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the text tower; by default `learning_rate`."}
    )

    # On which data
    augment: Any = field(
        default=None,
        metadata={"help": "Augment images: crop_scale, flip and resolution; {} for the defaults."},
    )
    cache_features: bool = field(
        default=True,
        metadata={"help": "Compute the outputs of frozen parts of the towers once and keep them in CLIPMINI_CACHE."},
    )
    num_views: int = field(default=1, metadata={"help": "Number of augmented views of each image in the cache."})
    length_groups: int = field(
        default=1, metadata={"help": "Embed captions in n groups of similar length, with less padding to compute."}
    )

    # By which loss
    gradient_cache_chunk: int | None = field(
        default=None, metadata={"help": "Embed a batch in chunks of n pairs: any batch in the memory of one chunk."}
    )
    hard_negatives: Any = field(
        default=None,
        metadata={"help": "Weigh similar negatives more, after a share of the steps: {weight: 0.3, start: 0.3}."},
    )
    matryoshka_dims: str | list[int] | None = field(
        default=None, metadata={"help": "Widths at which truncated embeddings are trained too, such as 128,64,32."}
    )
    teacher: Any = field(
        default=None,
        metadata={"help": "Learn from embeddings made by `clipmini teach`: {file: teacher.parquet, weight: 0.5}."},
    )

    # What is saved
    bank: bool = field(
        default=True,
        metadata={"help": "Save vectors of training captions and images, to score without hubs, beside the model."},
    )

    # Changed defaults of TrainingArguments
    # The collator needs image and captions, which `forward` does not take.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave this off: the collator needs all columns."}
    )
    # A last batch of a few pairs has a handful of negatives and a gradient unlike the others'.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last batch if it is not full."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure retrieval on validation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Load the weights of the best checkpoint at the end."}
    )
    metric_for_best_model: str | None = field(
        default="eval_mean_recall",
        metadata={"help": "Metric that chooses the best checkpoint; the loss depends on the batch size."},
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a higher metric is better."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Images per forward pass when embedding."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trainer integrations to log to."})
    hub_strategy: str = field(default="end", metadata={"help": "Leave this: only complete models are pushed."})
    # Every trained parameter gets a gradient at every step, even when the step is taken in chunks; and BatchNorm's
    # statistics, the only buffers that could differ between processes, are frozen.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send buffers before each forward pass."}
    )

    def __post_init__(self) -> None:
        """Check the arguments, and complete them as `TrainingArguments` does.

        Raises:
            ValueError: a value cannot work; the message names the field and what is allowed.
        """
        self._check_numbers()
        self._check_choices()
        self._check_towers()
        self._warn_of_options_without_effect()
        if self.augment is None and self.num_views > 1:
            raise ValueError(f"num_views={self.num_views} without `augment` would be the same view again and again.")
        # Read, and so checked, now, before anything is loaded.
        _ = self.image_augmentation, self.matryoshka_widths, self.hard_negative_options, self.teacher_options
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # without a GPU torch warns about it in every epoch
        try:
            super().__post_init__()
            with suppress(ValueError):  # some ask for the model, which the trainer gives them
                Trainer.get_optimizer_cls_and_kwargs(self)
            kwargs: Any = self.lr_scheduler_kwargs
            get_scheduler(self.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 1, 2, kwargs)
        except (ImportError, TypeError) as error:
            unset_hf_deepspeed_config()  # half of one would be used as long as this error is kept, by a debugger say
            raise ValueError(
                f"An option of training cannot be used here: {first_sentence(error)}. Correct it, install what it "
                "needs, or leave it out."
            ) from error
        installed = get_available_reporting_integrations()
        if missing := set(self.report_to or ()) - {*installed, "azure_ml", "flyte"}:  # those two are not always listed
            raise ValueError(
                f"report_to={', '.join(sorted(missing))} is not installed; install it, leave it out, or use one that "
                f"is: {', '.join(installed) or 'none'}."
            )

    def _check_numbers(self) -> None:
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; use at least 1.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs:g} is not allowed; use a number above 0.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor:g} is not allowed; use 0 or more, below 1."
            )

    def _check_choices(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove images and captions; leave it out.")
        if self.hub_strategy != "end":
            raise ValueError(
                "hub_strategy other than 'end' would push checkpoints, which contain pickles; leave it out."
            )
        if self.save_only_model:
            raise ValueError("save_only_model=True would leave checkpoints that no run can resume from; leave it out.")
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False  # nothing is measured to choose it by
        best = self.metric_for_best_model
        allowed = [name for name in METRIC_NAMES if not name.endswith("_rank")]  # lower ranks are better
        if self.load_best_model_at_end and (best or "").removeprefix("eval_") not in allowed:
            raise ValueError(f"metric_for_best_model={best!r} is not allowed; use one of {', '.join(allowed)}.")

    def _check_towers(self) -> None:
        for tower in self.lora_towers:
            if getattr(self, f"freeze_{tower}"):
                raise ValueError(f"freeze_{tower} and lora={self.lora!r} contradict each other; leave one out.")
        if self.vision_stages is not None and (self.freeze_vision or "vision" in self.lora_towers):
            raise ValueError("vision_stages contradicts freeze_vision and LoRA on the vision tower; leave one out.")

    def _warn_of_options_without_effect(self) -> None:
        for tower in TOWERS:
            if getattr(self, f"freeze_{tower}") and getattr(self, f"{tower}_learning_rate") is not None:
                logger.warning("%s_learning_rate has no effect: freeze_%s is on", tower, tower)

    @property
    def lora_options(self) -> Lora | None:
        """The option `lora`, checked."""
        return _read_option(Lora, "lora", self.lora)

    @property
    def lora_towers(self) -> list[str]:
        """The towers that train low-rank updates: some of "vision" and "text"."""
        return self.lora_options.towers if self.lora_options else []

    @property
    def hard_negative_options(self) -> HardNegatives | None:
        """The option `hard_negatives`, checked."""
        return _read_option(HardNegatives, "hard_negatives", self.hard_negatives)

    @property
    def teacher_options(self) -> Teacher | None:
        """The option `teacher`, checked."""
        return _read_option(Teacher, "teacher", self.teacher)

    @property
    def image_augmentation(self) -> ImageAugmentation | None:
        """The option `augment`, checked; None for no augmentation."""
        return _read_option(ImageAugmentation, "augment", self.augment)

    @property
    def matryoshka_widths(self) -> tuple[int, ...]:
        """The option `matryoshka_dims`, "256,128" or [256, 128], checked; the widest first."""
        dims = self.matryoshka_dims
        parts = dims.split(",") if isinstance(dims, str) else dims or []
        try:
            widths = sorted({int(part) for part in parts}, reverse=True)
        except (TypeError, ValueError):
            widths = [0]
        if min(widths, default=1) < 1:
            raise ValueError(
                f"matryoshka_dims={dims!r} is not allowed; use whole numbers above 0, such as 256,128,64."
            )
        return tuple(widths)


def _read_option(cls: type, name: str, value: Any) -> Any:
    """Build the dataclass of an option that has several values; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        known = ", ".join(f"{item}: ..." for item in field_names(cls))
        raise ValueError(f"{name}={value!r} is not allowed; use {{{known}}}.")
    return build_section(cls, value, name)
