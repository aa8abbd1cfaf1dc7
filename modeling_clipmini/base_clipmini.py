"""What the dual encoder and its halves have in common: loading and saving, initialisation, what is frozen.

Shape letters used in the comments:
    I images, T captions, D width of the shared space.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, logging

from .configuration_clipmini import ClipMiniConfig
from .processing_clipmini import ClipMiniProcessor

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoModelForZeroShotImageClassification": "modeling_clipmini.ClipMiniModel",
    "AutoProcessor": "processing_clipmini.ClipMiniProcessor",
}


TOWER_OPTIONS = ("output_hidden_states", "output_attentions", "return_dict")
# What Trainer and the collators of others send on, which a contrastive model has no use for.
PASSED_OVER = ("labels", "token_type_ids", "num_items_in_batch")

# Where a model came from besides its name, so that its processor comes from there too. No token: every copy of the
# model would carry it.
PLACE_OPTIONS = ("revision", "subfolder", "cache_dir", "local_files_only")
NO_PICKLES = (
    "Weights are read from safetensors alone, since pickled ones can run code: ask their author for safetensors, or "
    "convert them with https://huggingface.co/spaces/safetensors/convert."
)


@dataclass
class ClipMiniOutput(ModelOutput):
    """What the dual encoder returns; fields that do not apply are None.

    Attributes:
        loss: scalar contrastive loss, at least 0.
        logits_per_image: (I, T) scaled cosine similarities; a softmax over a row ranks the captions of an image.
        logits_per_text: (T, I), its transpose.
        text_embeds: (T, D) caption embeddings of length 1.
        image_embeds: (I, D) image embeddings of length 1.
        text_model_output: the text tower's output; its `pooler_output` is the projection before normalisation.
        vision_model_output: the same of the vision tower.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, nested outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class ClipMiniVisionOutput(ModelOutput):
    """What the image half alone returns.

    Attributes:
        image_embeds: (I, D) image embeddings of length 1.
        last_hidden_state: the tower's last features, of the shape that its architecture has.
        hidden_states: the feature maps of its stages, where asked for.
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ClipMiniTextOutput(ModelOutput):
    """What the caption half alone returns.

    Attributes:
        text_embeds: (T, D) caption embeddings of length 1.
        last_hidden_state: (T, L, W) the tower's last token states.
        hidden_states: the same of all its layers, where asked for.
        attentions: the attention weights of all its layers, where asked for.
    """

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ClipMiniProjection(nn.Module):
    """The "mlp" head: linear, GELU, linear, dropout, residual, LayerNorm (Shariatnia's Simple CLIP, 2021)."""

    def __init__(self, input_dim: int, projection_dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(input_dim, projection_dim)
        self.fc = nn.Linear(projection_dim, projection_dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(projection_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, input_dim) to (N, projection_dim)."""
        projected = self.projection(hidden)
        return self.layer_norm(projected + self.dropout(self.fc(F.gelu(projected))))


class ClipMiniPreTrainedModel(PreTrainedModel):
    """Weights, saving and the two towers' gradient checkpointing, common to the dual encoder and its halves.

    Attributes:
        processor: the model's `ClipMiniProcessor`, read from where the model came from when it is first asked for; it
            can be set. `encode_image` and `encode_text` use it.
    """

    config: ClipMiniConfig
    processor: ClipMiniProcessor
    config_class = ClipMiniConfig
    base_model_prefix = "clipmini"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' API, as are the other lists
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer must not rescale it by item counts
    _supports_sdpa = True
    _batch_norm_is_frozen = False
    _place: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, but from safetensors alone.

        Raises:
            ValueError: the weights are pickled, as `pytorch_model.bin` is, or missing.
        """
        loaded = load_safetensors(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._place = {name: kwargs[name] for name in PLACE_OPTIONS if kwargs.get(name) is not None}
        return loaded

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse pickles where all ways of loading meet: an index of shards and an adapter can name them too."""
        for file in checkpoint_files or ():
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"{file} is not in safetensors. {NO_PICKLES}")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Read `processor` when it is first asked for. A property would be read by torch.jit too, which lists them."""
        if name != "processor":
            return super().__getattr__(name)
        remedy = "set one: model.processor = AutoProcessor.from_pretrained(...)"
        if not self.name_or_path:
            raise AttributeError(f"This model was not loaded from anywhere, so it knows no processor; {remedy}.")
        place = dict(self._place)
        if commit := getattr(self.config, "_commit_hash", None):
            place["revision"] = commit  # a branch may have moved on
        try:
            self.processor = ClipMiniProcessor(
                AutoImageProcessor.from_pretrained(self.name_or_path, **place),
                # Given no config it would read one, and ask whether to trust the very code that is running.
                AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, **place),
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise AttributeError(f"{self.name_or_path} gives no processor ({reason}); {remedy}.") from error
        return self.processor

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise our own heads; the towers bring their own `_init_weights`.

        `init` leaves alone what a checkpoint has filled. Linear layers start with standard deviation 1/sqrt(fan in),
        as CLIP's projections do.
        """
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _tower_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pick from further arguments of a call what towers take; without this their errors name methods of theirs."""
        for name, value in arguments.items():
            if name not in (*TOWER_OPTIONS, *PASSED_OVER) and value is not None:  # peft sends all that it knows of
                own = [own for own in inspect.signature(self.forward).parameters if own != "kwargs"]
                raise TypeError(
                    f"{type(self).__name__} takes no argument {name!r}; it takes {', '.join((*own, *TOWER_OPTIONS))}."
                )
        return {name: value for name, value in arguments.items() if name in TOWER_OPTIONS}

    def _projection(self, input_dim: int) -> nn.Module:
        config = self.config
        if config.projection == "linear":
            return nn.Linear(input_dim, config.projection_dim, bias=False)
        return ClipMiniProjection(input_dim, config.projection_dim, config.projection_dropout)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Reach both towers: transformers sets flags on its own layers, timm has a switch of its own."""
        if hasattr(self, "text_model"):
            super()._set_gradient_checkpointing(enable, *args, **kwargs)
        vision_model: Any = getattr(self, "vision_model", None)
        if vision_model is not None:
            if vision_model.supports_gradient_checkpointing:
                vision_model._set_gradient_checkpointing(enable)
                vision_model.gradient_checkpointing = enable  # where transformers looks
            elif enable:
                logger.warning(
                    f"timm's {self.config.vision_config.architecture} has no gradient checkpointing: the vision tower "
                    "keeps all its activations."
                )

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, with all Auto classes in `auto_map`.

        transformers notes one Auto class per class. The zero-shot pipeline asks for another, which a half cannot be.
        """
        if self._auto_class is not None:  # is_remote_code() is younger than transformers 5.0
            auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
            if not (hasattr(self, "vision_model") and hasattr(self, "text_model")):
                del auto_map["AutoModelForZeroShotImageClassification"]
            self.config.auto_map = auto_map
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze_batch_norm(self) -> None:
        """Keep the BatchNorm statistics of the pretrained towers from now on; scale and shift go on learning.

        The statistics of a small batch, or of a chunk of one, are noise next to those that the tower was trained with.
        """
        self._batch_norm_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; what is frozen stays in eval mode.

        Otherwise a frozen tower would still drop units and, worse, move its BatchNorm statistics. Trainer calls this
        at every step, so the rule has to live here.
        """
        super().train(mode)
        if not mode:
            return self
        for module in _frozen_modules(self):
            module.training = False  # not `eval()`, which of the model itself would come back here
        if self._batch_norm_is_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """List the modules that have parameters of which none is trained, with all that is in them."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield from module.modules()
    else:
        for child in module.children():
            yield from _frozen_modules(child)


def load_safetensors(load: Callable[..., Any], name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a `from_pretrained` so that it reads no pickled weights.

    Args:
        load: the method.
        name_or_path: what to load.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        What it returns.

    Raises:
        ValueError: the weights are pickled or missing, or pickled ones are asked for.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False is not allowed. {NO_PICKLES}")
    kwargs["use_safetensors"] = True
    try:
        return load(name_or_path, *args, **kwargs)
    except OSError as error:
        if SAFE_WEIGHTS_NAME not in str(error) or error.__cause__ is not None:  # which a broken connection is
            raise
        # Of an id on the Hub transformers says the same where there is no network.
        doubt = "" if os.path.isdir(name_or_path) else ", or the Hub cannot be reached"
        raise ValueError(f"{name_or_path} has no {SAFE_WEIGHTS_NAME}{doubt}. {NO_PICKLES}") from error


def normalise(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32: (N, D) to (N, D)."""
    return F.normalize(features.float(), dim=-1)
