"""What a run can be told: the `training` and `data` sections of a recipe."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from clipmini.data.augment import ImageAugmentation
from clipmini.evaluation.retrieval import METRIC_NAMES

from .lora import TOWERS

logger = logging.getLogger(__name__)

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_cache_chunk",
    "loss_chunk",
    "captions_per_epoch",
    "num_views",
    "length_groups",
    "vision_stages",
    "lora_rank",
)
SHARES = ("word_dropout", "hard_negative_start", "distillation_weight")


@dataclass
class ClipMiniTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what contrastive training of two towers adds, and defaults that fit it.

    `label_smoothing_factor` is InfoNCE's: the share of the target that is spread over all answers of a batch. What
    each field means is in its `help`.
    """

    # What is trained
    freeze_vision: bool = field(default=False, metadata={"help": "Train only the projection of the vision tower."})
    freeze_text: bool = field(default=False, metadata={"help": "Train only the projection of the text tower."})
    vision_stages: int | None = field(
        default=None,
        metadata={
            "help": "Train only this many of the vision tower's last stages, as timm counts them; by default all."
        },
    )
    freeze_batch_norm: bool = field(
        default=True, metadata={"help": "Keep the BatchNorm statistics that the vision tower was pretrained with."}
    )
    lora: str | None = field(
        default=None,
        metadata={"help": "Train low-rank updates of a tower in place of it: text, vision or vision,text."},
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the low-rank updates."})

    # How fast
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the vision tower; by default `learning_rate`."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the text tower; by default `learning_rate`."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Factor from each layer's learning rate to that of the layer before it."}
    )

    # On what
    captions_per_epoch: int = field(default=1, metadata={"help": "Captions of each image in an epoch."})
    unique_images_in_batch: bool = field(
        default=False, metadata={"help": "Never put two captions of one image into a batch."}
    )
    augment: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Vary the images: crop_scale, color_jitter, rand_augment, flip and resolution; {} for all "
            "defaults."
        },
    )
    word_dropout: float = field(default=0.0, metadata={"help": "Probability with which a caption loses a word."})
    cache_features: bool = field(
        default=True, metadata={"help": "Compute what frozen parts of the towers give once, and keep it on disk."}
    )
    num_views: int = field(default=1, metadata={"help": "Augmented views of each image in the cache."})
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cache; by default CLIPMINI_CACHE, else ~/.cache/clipmini."}
    )

    length_groups: int = field(
        default=1,
        metadata={"help": "Embed a batch's captions in this many groups of like length: less padding to compute."},
    )

    # By which loss
    gradient_cache_chunk: int | None = field(
        default=None, metadata={"help": "Embed a batch in chunks of this size: any batch in the memory of one chunk."}
    )
    loss_chunk: int = field(default=1024, metadata={"help": "Rows of the similarity matrix in memory at once."})
    hard_negative_weight: float = field(
        default=0.0, metadata={"help": "How much negatives that look like positives weigh more; 0 weighs all alike."}
    )
    hard_negative_start: float = field(
        default=0.3, metadata={"help": "Share of the steps before hard negatives begin to weigh more."}
    )
    matryoshka_dims: str | list[int] | None = field(
        default=None, metadata={"help": "Widths at which cut-off embeddings are to work as well, such as 128,64,32."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Parquet file of a teacher's embeddings, made by `clipmini teach`."}
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher's term in the loss, from 0 to 1."}
    )

    # Changed defaults of TrainingArguments
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
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Images per forward when embedding."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trainer integrations to log to."})
    hub_strategy: str = field(default="end", metadata={"help": "Leave this: only whole models are pushed."})
    # Every parameter that is trained gets a gradient at every step, also where the step is taken in chunks; and the
    # statistics of BatchNorm, the only buffers that could differ, are frozen.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send buffers before each forward."})

    def __post_init__(self) -> None:
        """Check and complete the arguments as `TrainingArguments` does.

        Raises:
            ValueError: a value that cannot work; the message names the field and what is allowed.
        """
        self._check_numbers()
        self._check_choices()
        self._check_towers()
        if self.augment is None and self.num_views > 1:
            raise ValueError(f"num_views={self.num_views} without `augment` would be the same view again and again.")
        self.image_augmentation  # noqa: B018 - its fields are checked now, before anything is loaded
        self.matryoshka_widths  # noqa: B018 - likewise
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinned memory is there for a GPU; without one torch warns per epoch
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; use at least 1.")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} is not allowed; use a number from 0 to 1.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs:g} is not allowed; use a number above 0.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay:g} is not allowed; use a number above 0, at most 1.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor:g} is not allowed; use 0 or more, below 1."
            )
        if self.hard_negative_weight < 0:
            raise ValueError(f"hard_negative_weight={self.hard_negative_weight:g} is not allowed; use at least 0.")

    def _check_choices(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take images and captions away; leave it out.")
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError("hub_strategy other than 'end' would push checkpoints, which hold pickles; leave it out.")
        if self.save_only_model:
            raise ValueError("save_only_model=True would leave checkpoints that no run can go on from; leave it out.")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.load_best_model_at_end = False  # nothing is measured to choose by
        best = self.metric_for_best_model
        allowed = [name for name in METRIC_NAMES if not name.endswith("_rank")]  # of ranks, less would be better
        if self.load_best_model_at_end and (best or "").removeprefix("eval_") not in allowed:
            raise ValueError(f"metric_for_best_model={best!r} is not allowed; use one of {', '.join(allowed)}.")

    def _check_towers(self) -> None:
        for tower in self.lora_towers:
            if tower not in TOWERS:
                raise ValueError(f"lora={self.lora!r} is not allowed; use vision, text or vision,text.")
        for tower in TOWERS:
            if getattr(self, f"freeze_{tower}") and tower in self.lora_towers:
                raise ValueError(f"freeze_{tower} and lora={self.lora!r} contradict each other; leave one out.")
        if self.vision_stages is not None and (self.freeze_vision or "vision" in self.lora_towers):
            raise ValueError("vision_stages contradicts freeze_vision and LoRA on the vision tower; leave one out.")
        self._name_options_without_effect()

    def _name_options_without_effect(self) -> None:
        for tower in TOWERS:
            if getattr(self, f"freeze_{tower}") and getattr(self, f"{tower}_learning_rate") is not None:
                logger.warning("%s_learning_rate has no effect: freeze_%s is on", tower, tower)
        if self.cache_features and self.freeze_text:
            for name, default in (("word_dropout", 0), ("length_groups", 1)):
                if getattr(self, name) != default:
                    logger.warning("%s has no effect: what the frozen text tower gives is cached", name)
        if self.cache_features and self.freeze_vision and self.augment is not None and self.num_views == 1:
            logger.warning("augment makes one view of each image, the same in every epoch: set num_views higher")

    @property
    def lora_towers(self) -> list[str]:
        """The towers that train low-rank updates: some of "vision" and "text"."""
        return [name.strip() for name in (self.lora or "").split(",") if name.strip()]

    @property
    def image_augmentation(self) -> ImageAugmentation | None:
        """What `augment` says, checked; None for no augmentation. `resolution` is apart from it."""
        if self.augment is None:
            return None
        known = [item.name for item in fields(ImageAugmentation)]
        for key in self.augment:
            if key not in (*known, "resolution"):
                raise ValueError(f"augment has no {key!r}; it has {', '.join((*known, 'resolution'))}.")
        return ImageAugmentation(**{key: value for key, value in self.augment.items() if key != "resolution"})

    @property
    def matryoshka_widths(self) -> tuple[int, ...]:
        """What `matryoshka_dims` says, "256,128" or [256, 128], checked; the widest first."""
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
