"""ClipMiniTrainer: the Hugging Face Trainer, extended by what contrastive training needs."""

import copy
import functools
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, speed_metrics

from clipmini.data.augment import ImageAugmenter, normalize_pixels
from clipmini.data.pairs import PairDataset
from clipmini.evaluation.measure import measure_pairs, measure_split
from clipmini.evaluation.naming import METRIC_LABELS
from clipmini.evaluation.retrieval import DIRECTIONS
from clipmini.files import versions
from clipmini.inference.teacher import TeacherEmbeddings
from clipmini.publishing.card import render_card
from clipmini.publishing.folder import save_model_folder
from clipmini.publishing.push import CARD, explain_refusals, make_repository, prepare_push, push
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import channels_last

from .arguments import ClipMiniTrainingArguments
from .batches import ClipMiniCollator, EpochPairs, PairSampler, pool_by_length
from .gradient_cache import Batch, cached_backward, check_batch_norm, moving_batch_norms
from .lora import add_lora, has_adapters, load_adapter, merge_lora, save_adapter
from .objective import ContrastiveObjective, Embeddings, world_size
from .recipes import data_part, describe_stage, model_parts
from .stages import parameter_groups, stage_parts

logger = logging.getLogger(__name__)

MAX_NAMES = 8  # of images, in an error
BAR_FIGURES = {"loss": "{:.3f}", "logit_scale": "{:.1f}", "grad_norm": "{:.2f}", "pairs_per_second": "{:.0f}"}
BAR_RECALLS = [f"{direction}_r{k}" for direction in DIRECTIONS for k in (1, 5)]


class ClipMiniTrainer(Trainer):
    """Train a [`ClipMiniModel`] on image-caption pairs.

    It adds to `Trainer` negatives from all processes, batches of any size (gradient cache) and the options of
    `ClipMiniTrainingArguments`. `evaluate` measures retrieval over a whole split, so that
    `metric_for_best_model="eval_mean_recall"` chooses checkpoints by what the model is for; the contrastive loss of a
    split depends on the batch size and cannot.

    The pairs of a batch and their augmentation depend on `seed` (`data_seed` if given), epoch and image alone, not on
    the number of data workers, nor on whether the run was interrupted and resumed. Cached views are made once and are
    the same for every seed; the seed chooses which of them an epoch meets.

    Constructing it computes nothing. Where parts of the towers are frozen, pass what `prepare_features` returns in
    place of the data sets: training then skips those parts, instead of running them at every step.

    Args:
        model: the dual encoder; what the arguments do not train is frozen.
        args: see `ClipMiniTrainingArguments`; left unchanged.
        train_dataset: one row per image with `image`, `captions` and `image_id`, as `load_pairs` returns it; or with
            features, from `prepare_features`.
        eval_dataset: likewise, to be measured by `evaluate`; or a dict of several.
        processing_class: the model's processor, which becomes its `processor`; by default the one that it has.
        **kwargs: passed to `Trainer`: `callbacks`, `optimizers`, ...

    Raises:
        ValueError: several GPUs are visible to one process, which Trainer would use through `DataParallel`; or an
            option does not fit the model or the data.
    """

    is_resumed = False  # the training time is unknown then
    hub_model_id: Any  # a string, once the repository exists
    args: ClipMiniTrainingArguments
    model: ClipMiniModel
    processing_class: ClipMiniProcessor
    objective: ContrastiveObjective
    train_dataset: Any  # EpochPairs

    def __init__(
        self,
        model: ClipMiniModel,
        args: ClipMiniTrainingArguments,
        train_dataset: Dataset | PairDataset | None = None,
        eval_dataset: Dataset | PairDataset | dict[str, Dataset | PairDataset] | None = None,
        processing_class: ClipMiniProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: Trainer would split each batch over them with "
                "DataParallel, and each part would see only its own negatives. Start one process per GPU: "
                f"torchrun --nproc_per_node {args.n_gpu} -m clipmini.cli train ..., or set "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if processing_class is not None:
            model.processor = processing_class
        elif getattr(model, "processor", None) is None:
            raise ValueError("ClipMiniTrainer needs the model's processor: pass processing_class=processor.")
        args = copy.copy(args)  # Trainer changes its arguments
        _check_options(model, args)
        _freeze(model, args)
        _check_processes(model, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.processor,
            data_collator=kwargs.pop("data_collator", None) or ClipMiniCollator(model.processor),
            **kwargs,
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar)
        self.last_logged: tuple[float, int] | None = None
        self.sampler: PairSampler | None = None
        self.objective = ContrastiveObjective(
            label_smoothing=args.label_smoothing_factor, matryoshka_dims=args.matryoshka_widths
        )
        if train_dataset is not None:
            self._prepare_training(train_dataset)

    def _prepare_training(self, pairs: Dataset | PairDataset) -> None:
        """Set how the pairs of each epoch are drawn."""
        args, pairs = self.args, pairs if isinstance(pairs, PairDataset) else PairDataset(pairs)
        _check_features(pairs, args)
        teacher = augment = None
        if args.teacher_options is not None:
            teacher = TeacherEmbeddings.load(Path(args.teacher_options.file), pairs.rows)
            self.objective = replace(
                self.objective, distillation=args.teacher_options.weight, teacher_scale=teacher.logit_scale
            )
        if pairs.image_features is None and args.image_augmentation is not None:
            augment = ImageAugmenter(self.processing_class.image_processor, args.image_augmentation)
        seed = args.seed if args.data_seed is None else args.data_seed
        if len(pairs) < self._train_batch_size * args.world_size:
            args.dataloader_drop_last = False  # without the only batch there would be nothing to train on
        self.sampler = PairSampler(len(pairs), seed=seed)
        self.add_callback(_NextEpoch(self.sampler))
        self.train_dataset = EpochPairs(pairs, seed=seed, augment=augment, teacher=teacher)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, and measure the speed anew."""
        self.last_logged = None
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from a checkpoint of the last step within an epoch, Trainer would take one step too many. (Before
        # transformers 5.4 it does, since it has no such method.)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler | None:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(self.model, self.args), **options)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Accumulate the gradient of one batch from `ClipMiniCollator`.

        Returns:
            The detached loss; its mean over the processes is the loss of the global batch.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            ValueError: a gradient cache meets BatchNorm in train mode.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        rows, image_ids = batch.pop("rows"), batch.pop("image_ids")
        teacher = (batch.pop("teacher_image", None), batch.pop("teacher_text", None))
        bias = self.model.logit_bias
        scalars = [self.model.get_logit_scale(), *([] if bias is None else [bias])]
        # Gradients are averaged over processes, while the loss is the sum of their shares.
        factor = world_size() / self.current_gradient_accumulation_steps

        def loss_of(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
            loss = factor * self._current_objective()(Embeddings(image, text, image_ids, *teacher), scale, bias)
            if not loss.isfinite():
                is_broken = ~(image.isfinite().all(dim=1) & text.isfinite().all(dim=1))
                names = self.train_dataset.names(rows[is_broken if is_broken.any() else ...].tolist())
                raise NonFiniteLossError(loss.item(), self.state.global_step + 1, names)
            return loss

        embed = functools.partial(self._embed, model)
        if self.args.gradient_cache_chunk is None:
            loss = loss_of(*embed(batch), *scalars)
            self.accelerator.backward(loss)
            return loss.detach()
        check_batch_norm(self.model)
        # Separate leaves, whose gradients reach the parameters with the last chunk, when the processes synchronize.
        leaves = [scalar.detach().requires_grad_() for scalar in scalars]

        def carried() -> Tensor:
            pairs = zip(scalars, leaves, strict=True)
            return torch.stack([scalar * leaf.grad for scalar, leaf in pairs if leaf.grad is not None]).sum()

        return cached_backward(
            embed,
            lambda image, text: loss_of(image, text, *leaves),
            batch,
            self.args.gradient_cache_chunk,
            backward=self.accelerator.backward,
            no_sync=functools.partial(self.accelerator.no_sync, model),
            last=carried,
        )

    def _embed(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the image and the caption embeddings of a batch, each (B, D) and of length 1."""
        inputs = dict(batch)
        if "pixels" in inputs:
            inputs["pixel_values"] = normalize_pixels(self.processing_class.image_processor, inputs.pop("pixels"))
        if "pixel_values" in inputs:
            inputs["pixel_values"] = channels_last(inputs["pixel_values"])
        with self.compute_loss_context_manager(), self.accelerator.autocast():  # which wraps only the model's forward
            if "vision_hidden" in inputs:
                stages = self.train_dataset.pairs.frozen_stages
                inputs["pooled_image"] = stages.resume(self.model, inputs.pop("vision_hidden"))
            if "input_ids" in inputs and self.args.length_groups > 1:
                captions = (inputs.pop("input_ids"), inputs.pop("attention_mask"))
                inputs["pooled_text"] = pool_by_length(self.model, *captions, self.args.length_groups)
            output = model(**inputs, return_loss=False, return_logits=False)
        return output.image_embeds, output.text_embeds

    def _current_objective(self) -> ContrastiveObjective:
        options = self.args.hard_negative_options
        if options is None or self.state.global_step < options.start * self.state.max_steps:
            return self.objective
        return replace(self.objective, hardness=options.weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and add the logit scale and the speed to the loss."""
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            logs["logit_scale"] = self.model.get_logit_scale().item()
            if self.last_logged is not None and self.last_logged[1] < step:
                per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
                then, last_step = self.last_logged
                logs["pairs_per_second"] = round(per_step * (step - last_step) / (now - then), 1)
            self.last_logged = (now, step)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | PairDataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure retrieval over the whole split; of a dict, over each.

        Returns:
            `{prefix}_text_to_image_r1`, ..., `{prefix}_mean_recall` in [0, 1]; the same with the suffix `_at_{width}`
            for each Matryoshka width; and the time taken.

        Raises:
            ValueError: there is no data to evaluate on.
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
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(pairs).items()}
        metrics.update(speed_metrics(metric_key_prefix, start_s))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.last_logged = None  # evaluation is no part of the training speed
        return metrics

    def measure(self, pairs: Dataset | PairDataset) -> dict[str, float]:
        """Measure retrieval as `evaluate` does, without logging and without a prefix."""
        with self.autocast_smart_context_manager():
            return measure_pairs(self.model, pairs, self.args.per_device_eval_batch_size, self.args.matryoshka_widths)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or while LoRA trains its adapter; `merge_lora` makes a plain model of it.

        Nothing is pushed: `push_to_hub` does, since it asks for what a card needs.
        """
        super().save_model(output_dir, _internal_call=True)

    # A checkpoint holds the model or, with LoRA, the adapter alone, as Trainer saves a `PeftModel`. All of it is there
    # before `trainer_state.json`, which marks a checkpoint as complete.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if has_adapters(self.model):
            save_adapter(self.model, folder)
            return
        super()._save(str(folder), state_dict)
        # Trainer pickles its arguments into every model's folder, where nothing reads them.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.is_resumed = True
        if has_adapters(self.model):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapters(self.model):
            load_adapter(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of `hub_model_id`, as `Trainer` does when `push_to_hub` is set.

        The defaults are `hub_token`, else that of the login, and `hub_private_repo`.

        Raises:
            ValueError: the Hub refused, cannot be reached, or has a public repository where a private one is wanted;
                the message says what to do.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        private = args.hub_private_repo if private is None else private
        with explain_refusals(name):
            self.hub_model_id = make_repository(HfApi(token=token or args.hub_token), name, private)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,
    ) -> Any:
        """Push the model as `clipmini push` does: checked, without pickles, with its card, in one commit.

        LoRA updates are merged into a copy of the model.

        Args:
            commit_message: title of the commit.
            blocking: wait for the upload.
            token: a token with write access; by default `hub_token`, else that of the login.
            revision: branch to push to; by default `hub_revision`, else main.
            private: whether only the owner may see the repository; by default `hub_private_repo`.
            **about: facts for the card, as in `create_model_card`; `license` and `dataset` are required.

        Returns:
            The `CommitInfo`, or its `Future` if not `blocking`; None on every process but the first.

        Raises:
            ValueError: license or data set are missing, or the Hub refused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        args, token = self.args, token or self.args.hub_token
        private = args.hub_private_repo if private is None else private
        card = self._make_card(**about)
        repo_id = self._repository_name(token)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clipmini-"))) / "model"
            model = copy.deepcopy(self.model) if has_adapters(self.model) else self.model
            merge_lora(model)
            save_model_folder(model, folder, card)
            prepared = prepare_push(folder, repo_id)  # before anything is created on the Hub
            cleanup = stack.pop_all()
        branch = revision or args.hub_revision

        def upload() -> CommitInfo | None:
            with cleanup:
                return push(prepared, private=private, revision=branch, message=commit_message, token=token).commit

        return upload() if blocking else HfApi().run_as_future(upload)

    def _repository_name(self, token: str | None) -> str:
        """Return owner/name of the repository; the Hub is asked for the owner only if it is not given."""
        name = str(self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)
        if "/" in name:
            return name
        with explain_refusals(name):
            return f"{HfApi(token=token).whoami()['name']}/{name}"

    def create_model_card(self, **about: Any) -> None:  # type: ignore[override]  # by keyword alone
        """Write the model card into the output folder.

        Args:
            **about: `license` of the model, as the Hub writes it; `dataset` that it was trained on, a Hub id or any
                name; `finetuned_from`, Hub ids of the towers or of the starting model; `tags`; `language` of the
                captions; `model_name`, by default that of the repository, else of the output folder. `tasks`,
                `dataset_tags` and `dataset_args` have no effect.

        Raises:
            ValueError: license or data set are missing.
        """
        if self.is_world_process_zero():
            self._make_card(**about).save(Path(str(self.args.output_dir)) / CARD)

    def _make_card(
        self,
        *,
        license: str | None = None,
        dataset: str | None = None,
        finetuned_from: str | Sequence[str] = (),
        tags: str | Sequence[str] = (),
        language: str | list[str] | None = None,
        model_name: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset_args: Any = None,
    ) -> ModelCard:
        if tasks or dataset_tags or dataset_args:
            logger.warning("tasks, dataset_tags and dataset_args have no effect: a card says these itself")
        if license is None or dataset is None:
            raise ValueError(
                "a card must state the model's license and what it was trained on: pass "
                'push_to_hub(license="apache-2.0", dataset="owner/name").'
            )
        args = self.args
        origins = [finetuned_from] if isinstance(finetuned_from, str) else finetuned_from
        results: dict[str, Any] = {"splits": self._measure_for_card(), "versions": versions()}
        if isinstance(self.train_dataset, EpochPairs):
            pairs = self.train_dataset.pairs
            results |= {"num_train_images": len(pairs), "num_train_captions": int(pairs.num_captions.sum())}
        logged = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return render_card(
            model_name or Path(str(args.hub_model_id or args.output_dir)).name,
            self.model.config,
            source=dataset,
            license=license,
            parts=[*(part for origin in origins for part in model_parts(origin)), data_part(dataset)],
            stages=[describe_stage("", args)],
            results=results | {"train_s": logged[-1] if logged and not self.is_resumed else None},
            tags=[tags] if isinstance(tags, str) else tags,
            language=language,
        )

    def _measure_for_card(self) -> dict[str, Any]:
        """Measure the evaluation data, in the form of `results.json`."""
        given: Any = self.eval_dataset
        splits: dict[str, PairDataset | None] = given if isinstance(given, dict) else {"validation": given}
        batch_size, widths = self.args.per_device_eval_batch_size, self.args.matryoshka_widths
        return {
            name: measure_split(self.model, pairs, batch_size, widths)[0]
            for name, pairs in splits.items()
            if pairs is not None
        }


class NonFiniteLossError(ValueError):
    """Raised for a loss that is NaN or infinite, since every weight would be NaN after the next step.

    Args:
        loss: the loss of a batch.
        step: optimizer step of the batch.
        names: the batch's images, of which the first are named.
    """

    def __init__(self, loss: float, step: int, names: Sequence[str]) -> None:
        where = f"at step {step}"
        if names:
            where += f", on the images {', '.join(names[:MAX_NAMES])}"
        if len(names) > MAX_NAMES:
            where += f" and {len(names) - MAX_NAMES} more"
        super().__init__(
            f"the loss is {loss} {where}; lower learning_rate, clip gradients with max_grad_norm=1, or train in "
            "float32 or bf16 if it was fp16."
        )


class TrainingBar(ProgressCallback):
    """Show transformers' progress bar with the latest figures, and write one line per evaluation.

    Everything goes to stderr, and leaves stdout to results. Transformers' own callback writes a line for every log.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show loss, logit scale, gradient norm and speed beside the bar."""
        if self.training_bar is not None:
            logs = logs or {}
            shown = {name: form.format(logs[name]) for name, form in BAR_FIGURES.items() if name in logs}
            self.training_bar.set_postfix(shown)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Write the recalls in percent."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            measured = {name: (metrics or {}).get(f"eval_{name}") for name in BAR_RECALLS}
            parts = [
                f"{METRIC_LABELS[name]} {100 * value:.1f}" for name, value in measured.items() if value is not None
            ]
            line = f"step {state.global_step}/{state.max_steps}, epoch {state.epoch or 0:.4g}: {', '.join(parts)}"
            self.training_bar.write(line, file=sys.stderr)


class _NextEpoch(TrainerCallback):
    """Set the sampler's epoch: whether accelerate does depends on how it has wrapped the sampler."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def _check_options(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> None:
    width = model.config.projection_dim
    if args.matryoshka_widths and args.matryoshka_widths[0] >= width:
        raise ValueError(
            f"matryoshka_dims={args.matryoshka_widths[0]} is not below the embeddings' width, {width}, which is "
            "always trained; leave it out, or raise projection_dim."
        )
    if model.logit_bias is not None and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor:g} has no meaning for the sigmoid loss, which makes "
            "no distribution over captions. Leave it out, or set loss: infonce."
        )


def _check_features(pairs: PairDataset, args: ClipMiniTrainingArguments) -> None:
    """Check that features are those of frozen parts, and warn if frozen parts have none."""
    is_frozen = {"vision": args.freeze_vision or pairs.frozen_stages is not None, "text": args.freeze_text}
    has_features = {"vision": pairs.image_features is not None, "text": pairs.text_features is not None}
    for tower, frozen in is_frozen.items():
        if has_features[tower] and (not frozen or (pairs.frozen_stages is not None and args.vision_stages is None)):
            raise ValueError(
                f"The training data has features of the {tower} tower, which these arguments train: it would learn "
                "nothing. Call prepare_features with the same arguments, or pass the data without features."
            )
        if frozen and args.cache_features and not has_features[tower]:
            logger.warning(
                "the frozen %s tower runs at every step: pass what training.features.prepare_features returns", tower
            )


def _check_processes(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> None:
    if args.world_size == 1:
        return
    was_training = model.training
    model.train()
    moving = moving_batch_norms(model)
    model.train(was_training)
    if moving:
        raise ValueError(
            f"freeze_batch_norm=False with {args.world_size} processes: each would take the statistics of {moving[0]} "
            "from its share of a batch, and the processes would differ. Leave it out, or use one process."
        )


def _freeze(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> None:
    """Freeze what the arguments do not train."""
    if args.freeze_vision:
        model.freeze_vision_tower()
    if args.freeze_text:
        model.freeze_text_tower()
    if args.vision_stages is not None:
        timm_model = model.vision_model.timm_model
        stages = stage_parts(timm_model)
        if args.vision_stages > len(stages):
            raise ValueError(
                f"vision_stages={args.vision_stages}: the vision tower has {len(stages)}, stem and head included."
            )
        for name in [name for stage in stages[: -args.vision_stages] for name in stage]:
            timm_model.get_parameter(name).requires_grad_(False)
        if model.side_width:
            model.vision_model.side.requires_grad_(False)
    if args.lora_options is not None:
        add_lora(model, args.lora_options.towers, args.lora_options.rank)
    if args.freeze_batch_norm:
        model.freeze_batch_norm()
    model.train(model.training)
