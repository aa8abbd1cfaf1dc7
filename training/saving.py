"""What a trainer leaves: checkpoints that hold all of a run, and the model on the Hub."""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from clipmini.data.licences import check_licence
from clipmini.data.pairs import CachedPairs
from clipmini.evaluation.measure import chance_level, evaluate_with_intervals
from clipmini.evaluation.naming import public_name
from clipmini.files import versions
from clipmini.publishing.card import DATA, CardFacts, Part, render_card
from clipmini.publishing.folder import save_model_folder
from clipmini.publishing.push import CARD, explain_refusals, make_repository, prepare_push, push
from clipmini.training.facts import describe_stage, model_parts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

from .arguments import ClipMiniTrainingArguments
from .lora import load_lora_state, lora_state, merged_state_dict
from .pairs import EpochPairs

logger = logging.getLogger(__name__)

LORA_FILE = "lora.safetensors"  # in a checkpoint, beside the merged weights


class SavingTrainer(Trainer):
    """The part of [`ClipMiniTrainer`] that writes: checkpoints, and models to the Hub."""

    args: ClipMiniTrainingArguments
    model: ClipMiniModel
    processing_class: ClipMiniProcessor
    is_resumed = False  # its time is not known then
    hub_model_id: Any  # a text, once the repository is made

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; it is pushed by `push_to_hub` alone, which is told what a card needs."""
        super().save_model(output_dir, _internal_call=True)

    # What a checkpoint holds beyond Trainer's. It is all written before `trainer_state.json`, which marks a checkpoint
    # as whole.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, self._plain_state_dict() if state_dict is None else state_dict)
        # Trainer pickles its arguments into every model's folder, where nothing reads them.
        (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _plain_state_dict(self) -> dict[str, Tensor] | None:
        """Give the weights of a plain model that loads anywhere; None where it is one already."""
        return merged_state_dict(self.model) if self.args.lora_towers else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.args.lora_towers:
            save_file(lora_state(self.model), Path(output_dir) / LORA_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.is_resumed = True
        if self.args.lora_towers:
            self._load_adapters(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.args.lora_towers:
            self._load_adapters(Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_adapters(self, folder: Path) -> None:
        # The merged weights bring heads, temperature and statistics; adapted weights have other names here.
        self.model.load_state_dict(load_file(folder / SAFE_WEIGHTS_NAME), strict=False)
        load_lora_state(self.model, load_file(folder / LORA_FILE))

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `hub_model_id`, as `Trainer` does when `push_to_hub` is set.

        Args:
            token: one that may write; by default `hub_token`, else the one that is logged in.
            private: let only the owner see it; by default `hub_private_repo`. A public one that is there is refused.

        Raises:
            ValueError: the Hub refused, or cannot be reached; the message says what to do.
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

        Args:
            commit_message: the commit's.
            blocking: wait until it is done.
            token: one that may write; by default `hub_token` of the arguments, else the one that is logged in.
            revision: the branch; by default `hub_revision`, else main.
            private: let only the owner see the repository; by default `hub_private_repo`.
            **about: what the card tells, as in `create_model_card`; `license` and `dataset` are needed.

        Returns:
            The `CommitInfo`, or unless `blocking` a `Future` of it; None on processes other than the first.

        Raises:
            ValueError: licence or data are not named, or the Hub refused.
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
            save_model_folder(self.model, self.processing_class, folder, card, state_dict=self._plain_state_dict())
            prepared = prepare_push(folder, repo_id)  # before anything is made on the Hub
            workshop = stack.pop_all()
        branch = revision or args.hub_revision

        def upload() -> CommitInfo:
            with workshop:
                return push(prepared, private=private, revision=branch, message=commit_message, token=token).commit

        return upload() if blocking else HfApi().run_as_future(upload)

    def _repository_name(self, token: str | None) -> str:
        """Give the repository's name with its owner, who is asked for only where no name tells."""
        name = str(self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)
        if "/" in name:
            return name
        with explain_refusals(name):
            return f"{HfApi(token=token).whoami()['name']}/{name}"

    def create_model_card(self, **about: Any) -> None:  # type: ignore[override]  # by keyword alone
        """Write the card into the output folder.

        Args:
            **about: `license`, the model's, as the Hub writes it; `dataset`, the data that it was trained on, by Hub
                id or any name; `finetuned_from`, Hub ids of towers or of the model that it goes on from; `tags`;
                `language`, of the captions; `model_name`, by default that of the repository, else of the output
                folder. Trainer's `tasks`, `dataset_tags` and `dataset_args` have no effect.

        Raises:
            ValueError: licence or data are not named.
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
            logger.warning("tasks, dataset_tags and dataset_args have no effect: the card tells task and data itself")
        if license is None or dataset is None:
            raise ValueError(
                "a card must tell under which licence the model may be used and what it was trained on: pass "
                'push_to_hub(license="apache-2.0", dataset="owner/name").'
            )
        args = self.args
        origins = [finetuned_from] if isinstance(finetuned_from, str) else finetuned_from
        results: dict[str, Any] = {"splits": self._measure_for_card(), "versions": versions()}
        if isinstance(self.train_dataset, EpochPairs):
            pairs = self.train_dataset.pairs
            results |= {"num_train_images": len(pairs), "num_train_captions": sum(pairs.num_captions)}
        logged = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return render_card(
            CardFacts(
                name=model_name or Path(str(args.hub_model_id or args.output_dir)).name,
                config=self.model.config,
                source=dataset,
                licence=check_licence(license),
                parts=[
                    *(part for origin in origins for part in model_parts(origin)),
                    Part(DATA, public_name(dataset)),
                ],
                stages=[describe_stage("", args)],
                results=results | {"train_s": logged[-1] if logged and not self.is_resumed else None},
                tags=[tags] if isinstance(tags, str) else tags,
                language=language,
            )
        )

    def _measure_for_card(self) -> dict[str, Any]:
        """Measure the evaluation data as results have them."""
        given: Any = self.eval_dataset
        splits: dict[str, Dataset | CachedPairs] = given if isinstance(given, dict) else {"validation": given}
        measured = {}
        for name, pairs in splits.items():
            if pairs is None:
                continue
            metrics = evaluate_with_intervals(
                self.model, self.processing_class, pairs, self.args.per_device_eval_batch_size
            )
            cached = pairs if isinstance(pairs, CachedPairs) else CachedPairs(pairs)
            measured[name] = {
                "num_images": len(cached),
                "num_captions": sum(cached.num_captions),
                "chance": chance_level(cached),
                "after": {metric: interval.value for metric, interval in metrics.items()},
                "intervals": {metric: [interval.low, interval.high] for metric, interval in metrics.items()},
            }
        return measured
