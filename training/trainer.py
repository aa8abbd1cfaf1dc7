"""ClipMiniTrainer: the HF Trainer, with what contrastive training needs beyond it."""

import time
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import speed_metrics

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

from .arguments import ClipMiniTrainingArguments
from .collator import ClipMiniCollator
from .evaluate import evaluate_retrieval
from .features import CachedPairs, cache_features
from .progress import RecallProgress

TOWERS = ("vision_model", "text_model")


class ClipMiniTrainer(Trainer):
    """Train a [`ClipMiniModel`] on a pair data set.

    Beyond `Trainer`: a learning rate for each tower and one for the heads; frozen towers, whose features are computed
    once; and `evaluate` is retrieval over the whole split, so that `metric_for_best_model="eval_mean_recall"` picks
    checkpoints by what the model is for. The contrastive loss of a split depends on the batch size and cannot.

    Args:
        model: the dual encoder.
        args: see `ClipMiniTrainingArguments`.
        train_dataset: one row per image: `image`, `captions`, `image_id`, as `load_pairs` gives.
        eval_dataset: the same for `evaluate`, or a dict of several.
        processing_class: the model's processor.
        **kwargs: passed to `Trainer`: `callbacks`, `optimizers`, ...

    Raises:
        ValueError: several GPUs are visible to one process, which Trainer would use through `DataParallel`; or several
            processes train together, whose negatives are not gathered yet.
    """

    args: ClipMiniTrainingArguments
    model: ClipMiniModel
    processing_class: ClipMiniProcessor

    def __init__(
        self,
        model: ClipMiniModel,
        args: ClipMiniTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ClipMiniProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: Trainer would split each batch over them with "
                "DataParallel, and every part would see only its own negatives. Set CUDA_VISIBLE_DEVICES=0."
            )
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes train together, but negatives are not gathered across them yet: each "
                "would see only its own. Start one process."
            )
        if processing_class is None:
            raise ValueError("ClipMiniTrainer needs the model's processor: pass processing_class=processor.")
        if args.freeze_vision:
            model.freeze_vision_tower()
        if args.freeze_text:
            model.freeze_text_tower()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None) or ClipMiniCollator(processing_class),
            **kwargs,
        )
        if train_dataset is not None and len(train_dataset) < self._train_batch_size:
            args.dataloader_drop_last = False  # dropping the only batch would train on nothing
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RecallProgress)
        self.train_dataset = self.with_cached_features(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self.with_cached_features(pairs) for name, pairs in self.eval_dataset.items()}
        else:
            self.eval_dataset = self.with_cached_features(self.eval_dataset)

    def with_cached_features(self, pairs: Dataset | CachedPairs | None) -> Dataset | CachedPairs | None:
        """Replace what frozen towers would compute in every epoch by features computed once.

        Args:
            pairs: a pair data set.

        Returns:
            The same pairs; unchanged if no tower is frozen or `cache_features` is off.
        """
        args = self.args
        if pairs is None or isinstance(pairs, CachedPairs) or not args.cache_features:
            return pairs
        if not (args.freeze_vision or args.freeze_text):
            return pairs
        with self.autocast_smart_context_manager():
            return cache_features(
                self.model,
                self.processing_class,
                pairs,
                vision=args.freeze_vision,
                text=args.freeze_text,
                batch_size=args.per_device_eval_batch_size,
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(model or self.model, self.args), **options)
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: Dataset | CachedPairs | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure retrieval over the whole split.

        Args:
            eval_dataset: by default the one given to the constructor; of a dict, each is measured in turn.
            ignore_keys: has no meaning here; `Trainer` passes it.
            metric_key_prefix: stands before every key.

        Returns:
            `{prefix}_text_to_image_r1`, ..., `{prefix}_mean_recall` in [0, 1], and the time taken.

        Raises:
            ValueError: there is no data set to evaluate on.
        """
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if pairs is None:
            raise ValueError("There is nothing to evaluate on: pass eval_dataset, or set eval_strategy='no'.")
        if isinstance(pairs, dict):
            metrics: dict[str, float] = {}
            for name, split in pairs.items():
                metrics.update(self.evaluate(split, metric_key_prefix=f"{metric_key_prefix}_{name}"))
            return metrics
        start_s = time.time()
        with self.autocast_smart_context_manager():
            recalls = evaluate_retrieval(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                pairs,
                self.args.per_device_eval_batch_size,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recalls.items()}
        metrics.update(speed_metrics(metric_key_prefix, start_s))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def parameter_groups(model: nn.Module, args: ClipMiniTrainingArguments) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    Weight decay pulls matrices only: on norms and biases it does nothing useful, on the temperature it would be a pull
    towards a logit scale of 1.

    Args:
        model: the dual encoder, possibly wrapped for distributed training.
        args: `learning_rate` is that of the heads and the temperature; the towers' default to it.

    Returns:
        Groups for a torch optimizer; empty ones are left out.
    """
    rates = {
        "vision_model": args.vision_learning_rate,
        "text_model": args.text_learning_rate,
        "heads": args.learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((tower for tower in TOWERS if tower in name.split(".")[:2]), "heads")
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate if rates[part] is None else rates[part],
            "weight_decay": args.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]
