"""The dual encoder: a timm image tower and a text tower, each with a projection, meeting in one vector space.

Shape letters used in the comments:
    B pairs, I images, T captions (I = T = B in training), L tokens of the longest caption,
    V width of the vision tower's pooled output, W width of the text tower, D width of the shared space.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    can_return_tuple,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_clipmini import ClipMiniConfig
from .encoding_clipmini import encode
from .images_clipmini import image_size, read_image, read_named
from .loss_clipmini import infonce_loss, pairwise_logits, sigmoid_loss
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
        text_model_output: the text tower's output; its `pooler_output` is the projection before normalization.
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
        """Initialize our own heads; the towers bring their own `_init_weights`.

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


def normalize(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32: (N, D) to (N, D)."""
    return F.normalize(features.float(), dim=-1)


class ClipMiniVisionHalf(ClipMiniPreTrainedModel):
    """The image half: timm model, pooled output, projection."""

    # The one opener, for what has a model but not its package: the handler of Inference Endpoints is a lone file.
    read_image = staticmethod(read_image)
    image_size = staticmethod(image_size)

    def _add_vision_tower(self) -> None:
        config = self.config
        self.vision_model = TimmWrapperModel(config.vision_config)
        timm_model = self.vision_model.timm_model
        _refuse_shared_weights(timm_model, config)
        if next(timm_model.parameters()).device.type != "meta":  # it is, where weights are to be loaded
            # timm knows how to start its own models; transformers' one rule for all layers leaves some of them dead.
            tower = config.vision_config
            fresh = timm.create_model(tower.architecture, num_classes=0, **(tower.model_args or {}))
            timm_model.load_state_dict(fresh.state_dict())
        if config.vision_embed_dim is None:
            # Not num_features: after a head with a convolution of its own (MobileNetV3, GhostNet) that is too narrow.
            config.vision_embed_dim = timm_model.head_hidden_size + sum(_level_widths(timm_model, config))
        self.vision_dropout = nn.Dropout(config.vision_dropout)
        self.visual_projection = self._projection(config.vision_embed_dim)

    def freeze_vision_tower(self) -> None:
        """Train nothing in the image tower (its projection stays trainable); it keeps to eval mode from now on."""
        self.vision_model.requires_grad_(False)
        self.train(self.training)

    def pool_images(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower alone: (I, 3, height, width) to (I, V), what `pooled_image` takes."""
        features: Tensor = self._run_vision_tower(pixel_values)["pooler_output"]
        return features

    def _run_vision_tower(
        self, pixel_values: Tensor | None, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run the tower; `pooler_output` is (I, V), where wanted with the averages of `vision_levels` beside its own.

        These parts are scaled to root mean square 1 each, since feature maps differ in size a hundredfold. Joining
        stages goes back to hypercolumns (Hariharan et al. 2015, https://arxiv.org/abs/1411.5752).
        """
        levels = self.config.vision_levels
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # timm gives every stage for True, and those of a list.
        wanted = output_hidden_states or levels or None
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=wanted, **kwargs)
        features, maps = outputs.pooler_output.flatten(1), outputs.hidden_states
        if levels:
            chosen = [maps[level] for level in levels] if output_hidden_states else maps
            parts = [features, *(stage.flatten(2).mean(dim=2) for stage in chosen)]
            features = torch.cat([F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in parts], dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=maps if output_hidden_states else None,
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | None = None, pooled_image: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed images, before normalization.

        Args:
            pixel_values: (I, 3, height, width), normalized as the processor does.
            pooled_image: (I, V) pooled outputs of the vision tower that were computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states` and `return_dict`. `labels`, `token_type_ids` and `num_items_in_batch`,
                which Trainer and the collators of others send, are passed over.

        Returns:
            The tower's output; its `pooler_output` is the projection, (I, D), not yet of length 1.

        Raises:
            TypeError: there is no such argument.
        """
        outputs = BaseModelOutputWithPooling(pooler_output=pooled_image)
        options = self._tower_options(kwargs)
        if pooled_image is None:
            options.pop("output_attentions", None)  # timm models give none
            outputs = self._run_vision_tower(pixel_values, **options)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.visual_projection(self.vision_dropout(outputs.pooler_output)),
            hidden_states=outputs.hidden_states,
        )

    def encode_image(
        self,
        images: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray | Tensor:
        """Embed images as they are, with the model's own processor.

        Args:
            images: a Pillow image, a path or an http(s) address, or any iterable of these, which is read a batch at a
                time, as `read_image` does: upright, what is transparent white, within limits.
            batch_size: images per forward.
            show_progress_bar: draw one, or not; None draws it for what takes over two seconds.
            convert_to_tensor: give a tensor on the model's device rather than an array.
            truncate_dim: keep the first so many dimensions, for models trained with such widths (Matryoshka).

        Returns:
            (I, D) or (I, truncate_dim) float32, rows of length 1; one row alone for one image that is not in a list.

        Raises:
            ValueError: an image cannot be read (the message names it), or an argument is out of range.
        """

        def prepare(position: int, source: Any) -> Tensor:
            image = read_named(source, f"image number {position + 1}", allow_addresses=True)
            pixel_values: Tensor = self.processor(images=[image])["pixel_values"]
            return pixel_values

        def embed(batch: list[tuple[int, Any]]) -> Tensor:
            pixel_values = torch.cat([prepare(position, source) for position, source in batch])
            # Convolutions run a quarter to a half faster so.
            pixel_values = pixel_values.to(self.device, self.dtype, memory_format=torch.channels_last)
            return self.get_image_features(pixel_values, return_dict=True).pooler_output

        kinds = (str, PathLike, Image.Image)
        return encode(self, images, kinds, embed, None, batch_size, show_progress_bar, convert_to_tensor, truncate_dim)


def _refuse_shared_weights(timm_model: Any, config: ClipMiniConfig) -> None:
    names: dict[int, str] = {}
    for name, parameter in timm_model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise ValueError(
                f"timm's {config.vision_config.architecture} cannot be the vision tower: its {first} and {name} are "
                "one weight, and safetensors holds none under two names. Use another architecture."
            )


def _level_widths(timm_model: Any, config: ClipMiniConfig) -> list[int]:
    """Look up how wide the feature maps of `vision_levels` are."""
    if not config.vision_levels:
        return []
    name = config.vision_config.architecture
    if not hasattr(timm_model, "forward_intermediates"):
        raise ValueError(f"vision_levels cannot be used: timm's {name} gives no feature maps; leave it out.")
    widths = [stage["num_chs"] for stage in timm_model.feature_info]
    if config.vision_levels[-1] >= len(widths):
        raise ValueError(
            f"vision_levels={config.vision_levels} is not allowed: {name} has stages 0 to {len(widths) - 1}."
        )
    return [widths[level] for level in config.vision_levels]


class ClipMiniTextHalf(ClipMiniPreTrainedModel):
    """The caption half: text encoder, pooling over the real tokens, projection."""

    def _add_text_tower(self) -> None:
        self.text_model = AutoModel.from_config(self.config.text_config)
        if hasattr(self.text_model, "pooler"):
            self.text_model.pooler = None  # BERT's; pooling is ours, and unused it would never receive a gradient
        self.text_projection = self._projection(self.config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """Return the text tower's word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's word embeddings."""
        self.text_model.set_input_embeddings(value)

    def freeze_text_tower(self) -> None:
        """Train nothing in the text tower (its projection stays trainable); it keeps to eval mode from now on."""
        self.text_model.requires_grad_(False)
        self.train(self.training)

    def _pool_text(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Reduce (T, L, W) token states to (T, W): the first token, or the mean over tokens that are not padding.

        DistilBERT has no pooler of its own. The mask matters: without it a caption's embedding would change with the
        length of its neighbors in the batch.
        """
        if self.config.text_pooling == "cls":
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.mean(dim=1)
        mask = attention_mask[:, :, None].to(hidden.dtype)  # (T, L, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _cut_to_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cut captions to the positions that the tower has; their closing token stays the last.

        The processor has done so already; transformers' zero-shot pipeline pads its labels but does not cut them, and
        one long label would crash the tower.
        """
        positions = self.config.max_text_tokens
        if positions is None or input_ids.shape[1] <= positions:
            return input_ids, attention_mask
        logger.warning_once(f"A text of {input_ids.shape[1]} tokens was cut to the {positions} that the model reads.")
        if attention_mask is None:
            return torch.cat([input_ids[:, : positions - 1], input_ids[:, -1:]], dim=1), None
        # Padding stands behind.
        last = (attention_mask.sum(dim=1, keepdim=True) - 1).clamp(min=positions - 1)
        closing = input_ids.gather(1, last)  # of a caption that fits, what stands in that place anyway
        return torch.cat([input_ids[:, : positions - 1], closing], dim=1), attention_mask[:, :positions]

    def pool_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the text tower alone and pool its tokens: (T, L) to (T, W), what `pooled_text` takes."""
        input_ids, attention_mask = self._cut_to_positions(input_ids, attention_mask)
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self._pool_text(hidden, attention_mask)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embed captions, before normalization.

        Args:
            input_ids: (T, L) token ids; past the tower's last position they are cut.
            attention_mask: (T, L), 1 for tokens and 0 for padding; None means no padding.
            pooled_text: (T, W) pooled outputs of the text tower that were computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`; others as in
                `get_image_features`.

        Returns:
            The tower's output; its `pooler_output` is the projection, (T, D), not yet of length 1.

        Raises:
            TypeError: there is no such argument.
        """
        options = self._tower_options(kwargs)
        if pooled_text is None and input_ids is not None:
            input_ids, attention_mask = self._cut_to_positions(input_ids, attention_mask)
            outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **options)
            pooled_text = self._pool_text(outputs.last_hidden_state, attention_mask)  # (T, W)
        else:
            outputs = BaseModelOutputWithPooling()
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(pooled_text),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
        )

    def encode_text(
        self,
        texts: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray | Tensor:
        """Embed captions as they are, with the model's own processor.

        Args:
            texts: a string or any iterable of strings, cut to what the model reads. Long ones go first, together, so
                that little is padding; the result keeps the order given.
            batch_size: captions per forward.
            show_progress_bar: draw one, or not; None draws it for what takes over two seconds.
            convert_to_tensor: give a tensor on the model's device rather than an array.
            truncate_dim: keep the first so many dimensions, for models trained with such widths (Matryoshka).

        Returns:
            (T, D) or (T, truncate_dim) float32, rows of length 1; one row alone for a string that is not in a list.

        Raises:
            ValueError: something is no string, or an argument is out of range.
        """

        def embed(batch: list[tuple[int, Any]]) -> Tensor:
            inputs = self.processor(text=[text for _, text in batch]).to(self.device)
            return self.get_text_features(**inputs, return_dict=True).pooler_output

        return encode(
            self,
            texts,
            (str,),
            embed,
            lambda text: -len(text),
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            truncate_dim,
        )


class ClipMiniVisionModel(ClipMiniVisionHalf):
    """The image half alone; loads from a whole checkpoint and reads none of the text tower's weights."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_"]  # noqa: RUF012

    def __init__(self, config: ClipMiniConfig) -> None:
        super().__init__(config)
        self._add_vision_tower()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ClipMiniVisionOutput:
        """Embed `pixel_values` (I, 3, height, width); `image_embeds` of the output is (I, D), of length 1."""
        outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        return ClipMiniVisionOutput(
            image_embeds=normalize(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
        )


class ClipMiniTextModel(ClipMiniTextHalf):
    """The caption half alone; loads from a whole checkpoint and reads none of the vision tower's weights."""

    main_input_name = "input_ids"
    input_modalities = ["text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_"]  # noqa: RUF012

    def __init__(self, config: ClipMiniConfig) -> None:
        super().__init__(config)
        self._add_text_tower()
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> ClipMiniTextOutput:
        """Embed captions, (T, L) token ids; `text_embeds` of the output is (T, D), of length 1."""
        outputs = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        return ClipMiniTextOutput(
            text_embeds=normalize(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ClipMiniModel(ClipMiniVisionHalf, ClipMiniTextHalf):
    """The dual encoder: both towers, and the temperature that turns cosine similarities into logits."""

    main_input_name = "input_ids"

    def __init__(self, config: ClipMiniConfig) -> None:
        super().__init__(config)
        self._add_vision_tower()
        self._add_text_tower()
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))  # its logarithm, as in CLIP
        has_bias = config.loss == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init_value)) if has_bias else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if self.logit_bias is not None and self.config.logit_bias_init_value is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def get_logit_scale(self) -> Tensor:
        """Return the logit scale itself, the inverse temperature: a scalar in (0, logit_scale_max]."""
        log_max = math.log(self.config.logit_scale_max)
        if not self.training:
            return self.logit_scale.clamp(max=log_max).exp()
        # Clip the parameter itself, as CLIP does: past the limit `clamp` alone has no gradient to return by.
        with torch.no_grad():
            self.logit_scale.clamp_(max=log_max)
        return self.logit_scale.exp()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        return_loss: bool = True,
        return_logits: bool = True,
        pooled_image: Tensor | None = None,
        pooled_text: Tensor | None = None,
        **kwargs: Any,
    ) -> ClipMiniOutput:
        """Embed images, captions or both, and compare every image with every caption.

        Args:
            input_ids: (T, L) token ids, or None for images alone.
            pixel_values: (I, 3, height, width), normalized as the processor does, or None for captions alone.
            attention_mask: (T, L), 1 for tokens and 0 for padding.
            image_ids: (B,) integers saying which image each pair is of; pairs that share an id are positives of each
                other in the loss. None: each pair is its own.
            return_loss: give the loss where there are as many images as captions, row i of both being pair i. True by
                default, since Trainer looks at the default to know that the model has one.
            return_logits: compare images and captions. Without it there are embeddings alone: of a large batch the
                (I, T) logits would take more memory than all else.
            pooled_image: (I, V) pooled outputs of the vision tower in place of `pixel_values`.
            pooled_text: (T, W) pooled outputs of the text tower in place of `input_ids`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. `labels`, `token_type_ids` and
                `num_items_in_batch`, which Trainer and the collators of others send, are passed over.

        Returns:
            ClipMiniOutput; with one side only, that side's embeddings and no logits.

        Raises:
            TypeError: there is no such argument.
            ValueError: neither side is given, or `image_ids` does not name one image per pair.
        """
        has_image = pixel_values is not None or pooled_image is not None
        has_text = input_ids is not None or pooled_text is not None
        if not has_image and not has_text:
            raise ValueError("There is nothing to embed: give pixel_values, input_ids or both.")
        vision_output = text_output = images = texts = logits = loss = None
        if has_image:
            vision_output = self.get_image_features(pixel_values, pooled_image, return_dict=True, **kwargs)
            images = normalize(vision_output.pooler_output)  # (I, D)
        if has_text:
            text_output = self.get_text_features(input_ids, attention_mask, pooled_text, return_dict=True, **kwargs)
            texts = normalize(text_output.pooler_output)  # (T, D)
        if images is not None and texts is not None and return_logits:
            scale = self.get_logit_scale()
            logits = pairwise_logits(images, texts, scale, self.logit_bias)  # (I, T)
            if return_loss and len(images) == len(texts):
                if self.logit_bias is not None:
                    loss = sigmoid_loss(images, texts, scale, self.logit_bias, image_ids)
                else:
                    loss = infonce_loss(images, texts, scale, image_ids)
        return ClipMiniOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> "ClipMiniModel":
        """Join two pretrained towers; the projections and the temperature are new and want training.

        Args:
            vision_model_name_or_path: a timm model: Hub id ("timm/resnet50.a1_in1k") or local folder.
            text_model_name_or_path: a text encoder: Hub id ("distilbert/distilbert-base-uncased") or local folder.
            vision_kwargs: passed to the vision tower's `from_pretrained`: `revision`, `token`, `cache_dir`, ...
            text_kwargs: the same for the text tower.
            **config: fields of [`ClipMiniConfig`]: `projection_dim`, `loss`, ...

        Returns:
            The model, in eval mode, with every pretrained weight kept, in float32.

        Raises:
            ValueError: the vision tower is not a timm model, a checkpoint lacks weights of its tower, or the config
                has no such field.
        """
        known = inspect.signature(ClipMiniConfig.__init__).parameters
        if unknown := config.keys() - known.keys():
            raise ValueError(f"ClipMiniConfig has no field {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
        vision_kwargs, text_kwargs = dict(vision_kwargs or {}), dict(text_kwargs or {})
        vision_config = AutoConfig.from_pretrained(vision_model_name_or_path, **vision_kwargs)
        if not isinstance(vision_config, TimmWrapperConfig):
            raise ValueError(
                f"{vision_model_name_or_path!r} is not a timm model; name one, such as 'timm/resnet50.a1_in1k'."
            )
        text_config = AutoConfig.from_pretrained(text_model_name_or_path, **text_kwargs)
        model = cls(ClipMiniConfig(vision_config=vision_config, text_config=text_config, **config))
        vision_kwargs["config"], text_kwargs["config"] = model.config.vision_config, model.config.text_config
        towers = {
            "vision_model": _load_tower(TimmWrapperModel, vision_model_name_or_path, vision_kwargs),
            "text_model": _load_tower(AutoModel, text_model_name_or_path, text_kwargs),
        }
        # Put in whole, after construction: `post_init` initializes what it finds during it.
        for name, tower in towers.items():
            setattr(model, name, tower)
        if hasattr(model.text_model, "pooler"):
            model.text_model.pooler = None
        return model.eval()


def _load_tower(auto_class: Any, path: str, options: dict[str, Any]) -> nn.Module:
    """Load a pretrained tower in float32, from safetensors, and see that the checkpoint held all of it."""
    options = {"dtype": torch.float32, **options, "output_loading_info": True}
    # The classes of towers have no guard of their own against an index that names pickles.
    place = {name: options[name] for name in (*PLACE_OPTIONS, "token") if options.get(name) is not None}
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **place)
    for shard in get_checkpoint_shard_files(path, index, **place)[0] if index else ():
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{shard} is not in safetensors. {NO_PICKLES}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a classifier left over is as it should be, and what is missing is an error below
    try:
        tower, info = load_safetensors(auto_class.from_pretrained, path, **options)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # pooling is ours
    if missing:
        raise ValueError(
            f"{path!r} lacks weights of its own model, among them {missing[0]!r}; they would be "
            "random. Is it the right checkpoint?"
        )
    return tower
