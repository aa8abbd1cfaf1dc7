"""The dual encoder: a timm vision tower and a text tower, each projected into one shared vector space.

To understand CLIP, begin with `ClipMiniModel.forward`, then read `get_image_features` and `get_text_features`. The
rest loads, freezes and saves.

Shape letters used in the comments:
    B pairs, I images, T captions (I = T = B in training), L tokens of the longest caption,
    V width of the vision tower's pooled output, W width of the text tower, D width of the shared space.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    SiglipTextConfig,
    SiglipTextModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, can_return_tuple, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_clipmini import ClipMiniConfig
from .encoding_clipmini import by_length, channels_last, embed_in_batches, encode
from .folding_clipmini import fold_batch_norms
from .images_clipmini import image_size, read_image, read_named
from .loss_clipmini import infonce_loss, pairwise_logits, sigmoid_loss
from .processing_clipmini import ClipMiniProcessor, image_processor_for, preparation_of

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoModelForZeroShotImageClassification": "modeling_clipmini.ClipMiniModel",
    "AutoProcessor": "processing_clipmini.ClipMiniProcessor",
}

TOWER_OPTIONS = ("output_hidden_states", "output_attentions", "return_dict")
# Trainer and other libraries' collators pass these along; a contrastive model has no use for them.
IGNORED_ARGUMENTS = ("labels", "token_type_ids", "num_items_in_batch")

# Remembered when a model is loaded, so that its processor comes from the same source. The token is not: every copy of
# the model would carry it.
SOURCE_OPTIONS = ("revision", "subfolder", "cache_dir", "local_files_only")
NO_PICKLES = (
    "Only safetensors weights are loaded, because pickled weights can run code. Ask the author for safetensors, or "
    "convert the weights with https://huggingface.co/spaces/safetensors/convert."
)


class ClipMiniOutput(CLIPOutput):
    """Output of the dual encoder; fields that do not apply are None.

    Attributes:
        loss: scalar contrastive loss, at least 0.
        logits_per_image: (I, T) scaled cosine similarities; a softmax over a row ranks the captions for one image.
        logits_per_text: (T, I), the transpose.
        text_embeds: (T, D) caption embeddings of length 1.
        image_embeds: (I, D) image embeddings of length 1.
        text_model_output: the text tower's output; its `pooler_output` is the projection before normalization.
        vision_model_output: the same for the vision tower.
    """


class ClipMiniVisionOutput(CLIPVisionModelOutput):
    """Output of the image half alone.

    Attributes:
        image_embeds: (I, D) image embeddings of length 1.
        last_hidden_state: the tower's last features; their shape depends on the architecture.
        hidden_states: the feature maps of the tower's stages, if requested.
    """


class ClipMiniTextOutput(CLIPTextModelOutput):
    """Output of the caption half alone.

    Attributes:
        text_embeds: (T, D) caption embeddings of length 1.
        last_hidden_state: (T, L, W) token states of the tower's last layer.
        hidden_states: token states of every layer, if requested.
        attentions: attention weights of every layer, if requested.
    """


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
    """Loading, saving and freezing shared by the dual encoder and its two halves.

    Attributes:
        processor: the model's `ClipMiniProcessor`, which `encode_image` and `encode_text` use. On first access it is
            loaded from the model's own source; it can also be set.
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
    _source_options: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, but only from safetensors.

        Raises:
            ValueError: the weights are missing or pickled, as in `pytorch_model.bin`.
        """
        loaded = _load_safetensors(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._source_options = {name: kwargs[name] for name in SOURCE_OPTIONS if kwargs.get(name) is not None}
        return loaded

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse pickles at the point that every load passes: a shard index or an adapter can name them too."""
        _refuse_pickles(checkpoint_files or ())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Load `processor` on first access. It is no property, since torch.jit reads every property of a module."""
        if name != "processor":
            return super().__getattr__(name)
        remedy = "set one: model.processor = AutoProcessor.from_pretrained(...)"
        if not self.name_or_path:
            raise AttributeError(f"This model was not loaded from anywhere, so it knows no processor; {remedy}.")
        options = dict(self._source_options)
        if commit := getattr(self.config, "_commit_hash", None):
            options["revision"] = commit  # the branch may have moved on since the model was loaded
        try:
            self.processor = ClipMiniProcessor(
                AutoImageProcessor.from_pretrained(self.name_or_path, **options),
                # Without a config it would load one, and ask whether to trust the very code that is running.
                AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, **options),
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            raise AttributeError(f"{self.name_or_path} has no usable processor ({reason}); {remedy}.") from error
        return self.processor

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the projections; the towers bring their own `_init_weights`.

        `init` skips whatever a checkpoint has filled. Linear layers start with standard deviation 1/sqrt(fan in), like
        CLIP's projections.
        """
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _select_tower_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that a tower takes; refuse unknown ones here, where the message can name this model."""
        for name, value in arguments.items():
            # peft passes every argument that it knows, mostly as None.
            if name not in (*TOWER_OPTIONS, *IGNORED_ARGUMENTS) and value is not None:
                parameters = [*inspect.signature(self.forward).parameters, *TOWER_OPTIONS]
                known = ", ".join(parameter for parameter in parameters if parameter != "kwargs")
                raise TypeError(f"{type(self).__name__} takes no argument {name!r}; it takes {known}.")
        return {name: value for name, value in arguments.items() if name in TOWER_OPTIONS}

    def _make_projection(self, input_dim: int) -> nn.Module:
        config = self.config
        if config.projection == "linear":
            return nn.Linear(input_dim, config.projection_dim, bias=config.projection_bias)
        return ClipMiniProjection(input_dim, config.projection_dim, config.projection_dropout)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Set it in all towers: transformers sets flags on its own layers, timm has a switch of its own."""
        if hasattr(self, "text_model"):
            super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for vision_model in self.vision_towers():
            if vision_model.supports_gradient_checkpointing:
                vision_model._set_gradient_checkpointing(enable)
                vision_model.gradient_checkpointing = enable  # where transformers looks
            elif enable:
                logger.warning(
                    f"timm's {vision_model.config.architecture} does not support gradient checkpointing: the "
                    "vision tower keeps all its activations."
                )

    def vision_towers(self) -> list[Any]:
        """Return the vision tower and, if there is one, the side tower."""
        vision_model: Any = getattr(self, "vision_model", None)
        return [tower for tower in (vision_model, getattr(vision_model, "side", None)) if tower is not None]

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, with every Auto class in `auto_map`.

        transformers records one Auto class per model. The zero-shot pipeline needs another, which a half cannot be.
        """
        if self.is_remote_code():
            auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
            if not (hasattr(self, "vision_model") and hasattr(self, "text_model")):
                del auto_map["AutoModelForZeroShotImageClassification"]
            self.config.auto_map = auto_map
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze_batch_norm(self) -> None:
        """Stop updating the BatchNorm statistics of the pretrained towers; scale and shift still learn.

        The statistics of a small batch, or of a chunk of one, are noise next to those of the tower's own training.
        """
        self._batch_norm_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode, but keep in eval mode whatever is frozen.

        Otherwise a frozen tower would still apply dropout and, worse, update its BatchNorm statistics. Trainer calls
        `train()` at every step, so the rule has to live here.
        """
        super().train(mode)
        if not mode:
            return self
        for module in _frozen_modules(self):
            module.training = False  # not `eval()`: on the model itself that would call this method again
        if self._batch_norm_is_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are all frozen, together with all their submodules."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield from module.modules()
    else:
        for child in module.children():
            yield from _frozen_modules(child)


def _refuse_pickles(files: Iterable[str]) -> None:
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file. {NO_PICKLES}")


def _load_safetensors(load: Callable[..., Any], name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `load`, a `from_pretrained` method, in such a way that it reads no pickled weights.

    Raises:
        ValueError: the weights are missing or pickled, or pickled ones are asked for.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False is not allowed. {NO_PICKLES}")
    kwargs["use_safetensors"] = True
    try:
        return load(name_or_path, *args, **kwargs)
    except OSError as error:
        if SAFE_WEIGHTS_NAME not in str(error) or error.__cause__ is not None:  # a broken connection has a cause
            raise
        # For a Hub id transformers raises the same error when there is no network.
        doubt = "" if os.path.isdir(name_or_path) else ", or the Hub cannot be reached"
        raise ValueError(f"{name_or_path} has no {SAFE_WEIGHTS_NAME}{doubt}. {NO_PICKLES}") from error


def normalize(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32: (N, D) to (N, D)."""
    return F.normalize(features.float(), dim=-1)


def join_levels(parts: Sequence[Tensor]) -> Tensor:
    """Join features from several stages of a tower, each (N, channels), as (N, V) with V the sum of all channels.

    Each part is scaled to root mean square 1, since feature maps differ in size a hundredfold. Joining stages goes
    back to hypercolumns (Hariharan et al. 2015, https://arxiv.org/abs/1411.5752).
    """
    return torch.cat([F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in parts], dim=1)


class ClipMiniVisionHalf(ClipMiniPreTrainedModel):
    """The image half: one timm model or two, pooled output, projection."""

    # handler.py, which Inference Endpoints load as a lone file, has a model but cannot import its package.
    read_image = staticmethod(read_image)
    image_size = staticmethod(image_size)
    embed_in_batches = staticmethod(embed_in_batches)

    def _add_vision_tower(self) -> None:
        config = self.config
        self.vision_model = TimmWrapperModel(config.vision_config)
        if config.side_vision_config is not None:
            _check_side(config.vision_config, config.side_vision_config)
            # Within the first, so that whatever freezes, trains or hashes the vision tower does so with both.
            self.vision_model.side = TimmWrapperModel(config.side_vision_config)
        widths = []
        for tower in self.vision_towers():
            widths.append(_tower_width(tower, config.vision_levels))
            _refuse_shared_weights(tower.timm_model, tower.config.architecture)
            if tower.device.type != "meta":  # on the meta device weights are about to be loaded
                # transformers has one rule for all layers, which leaves some timm models dead; timm knows better.
                args = tower.config.model_args or {}
                fresh = timm.create_model(tower.config.architecture, num_classes=0, **args)
                tower.timm_model.load_state_dict(fresh.state_dict())
            fold_batch_norms(tower.timm_model)
        if config.vision_embed_dim is None:
            config.vision_embed_dim = sum(widths)
        self.side_width = sum(widths[1:])  # of the side tower's share of the pooled features
        self.vision_dropout = nn.Dropout(config.vision_dropout)
        self.visual_projection = self._make_projection(config.vision_embed_dim)

    def freeze_vision_tower(self) -> None:
        """Freeze the vision tower and keep it in eval mode; its projection stays trainable."""
        self.vision_model.requires_grad_(False)
        self.train(self.training)

    def pool_images(self, pixel_values: Tensor, pooled_side: Tensor | None = None) -> Tensor:
        """Run only the vision tower: (I, 3, height, width) to (I, V), which `pooled_image` takes.

        With `pooled_side`, (I, side width), which `pool_side` has returned for them, the side tower is skipped.
        """
        return self._run_vision_tower(pixel_values, pooled_side)["pooler_output"]

    def pool_side(self, pixel_values: Tensor) -> Tensor:
        """Run only the side tower: (I, 3, height, width) to (I, side width)."""
        return self._run_tower(self.vision_model.side, pixel_values, False)["pooler_output"]

    def _run_vision_tower(
        self,
        pixel_values: Any,
        pooled_side: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the vision tower; `pooler_output`, (I, V), includes the side tower's; all else is the first one's."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs: Any = self._run_tower(self.vision_model, pixel_values, output_hidden_states, **kwargs)
        if self.side_width:
            pooled_side = self.pool_side(pixel_values) if pooled_side is None else pooled_side
            outputs.pooler_output = torch.cat([outputs.pooler_output, pooled_side], dim=1)
        return outputs

    def _run_tower(
        self, tower: Any, pixel_values: Tensor, output_hidden_states: bool | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run one vision tower; `pooler_output` includes the averaged maps of `vision_levels`, if any."""
        levels = self.config.vision_levels
        # timm returns all stages for True, and only the listed ones for a list.
        outputs = tower(
            pixel_values=pixel_values, output_hidden_states=output_hidden_states or levels or None, **kwargs
        )
        pooled, maps = outputs.pooler_output.flatten(1), outputs.hidden_states
        if levels or self.side_width:
            level_maps = [maps[level] for level in levels] if output_hidden_states else maps or []
            pooled = join_levels([pooled, *(level_map.flatten(2).mean(dim=2) for level_map in level_maps)])
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooled,
            hidden_states=maps if output_hidden_states else None,
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | None = None, pooled_image: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed images, before normalization.

        Args:
            pixel_values: (I, 3, height, width), normalized as the processor does.
            pooled_image: (I, V) outputs of `pool_images`, computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states` and `return_dict`. `labels`, `token_type_ids` and `num_items_in_batch`,
                which Trainer and other libraries' collators pass along, are ignored.

        Returns:
            The tower's output; its `pooler_output` is the projection, (I, D), not yet of length 1.

        Raises:
            TypeError: there is no such argument.
        """
        options = self._select_tower_options(kwargs)
        options.pop("output_attentions", None)  # timm models have none
        if pooled_image is None:
            outputs = self._run_vision_tower(pixel_values, **options)
        else:
            outputs = BaseModelOutputWithPooling(pooler_output=pooled_image)
        outputs.pooler_output = self.visual_projection(self.vision_dropout(outputs.pooler_output))  # (I, V) to (I, D)
        return outputs

    def embed_pixels(self, batch: list[Tensor]) -> Tensor:
        """Embed n prepared images, each (1, 3, height, width), as (n, D), not yet of length 1."""
        pixel_values = channels_last(torch.cat(batch).to(self.device, self.dtype))
        return self.get_image_features(pixel_values, return_dict=True).pooler_output

    def encode_image(
        self,
        images: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray | Tensor:
        """Embed raw images with the model's own processor.

        Args:
            images: a Pillow image, a path or an http(s) address, or any iterable of these, which is consumed one batch
                at a time. Images are read as `read_image` does: upright, alpha over white, within its limits.
            batch_size: images per forward pass.
            show_progress_bar: whether to draw one; None draws it once the work has taken two seconds.
            convert_to_tensor: return a tensor on the model's device instead of an array.
            truncate_dim: keep only the first dimensions, for models trained with `matryoshka_dims`.

        Returns:
            (I, D) or (I, truncate_dim) float32, rows of length 1; a single row for one image outside a list.

        Raises:
            ValueError: an image cannot be read (the message names it), or an argument is out of range.
        """

        def prepare(index: int, source: Any) -> Tensor:
            name = f"image number {index + 1}"
            image = read_named(source, name, allow_addresses=True, min_edge=self.processor.min_edge)
            return self.processor(images=[image])["pixel_values"]

        return encode(
            self,
            [self],
            images,
            (str, PathLike, Image.Image),
            prepare,
            self.embed_pixels,
            None,
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            truncate_dim,
        )


def _check_side(first: TimmWrapperConfig, side: TimmWrapperConfig) -> None:
    """Raise unless both vision towers can see the same pixels."""
    prepared, wanted = image_processor_for(first), image_processor_for(side)
    for field in ("image_mean", "image_std", *(["crop_size"] * bool(preparation_of(side).get("fixed_input_size")))):
        needs, gets = getattr(wanted, field), getattr(prepared, field)
        if needs != gets:
            raise ValueError(
                f"{side.architecture} cannot stand beside {first.architecture}, whose pixels it would see: its "
                f"{field} is {needs}, not {gets}. Use another one."
            )


def _refuse_shared_weights(timm_model: Any, architecture: str) -> None:
    names: dict[int, str] = {}
    for name, parameter in timm_model.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise ValueError(
                f"timm's {architecture} cannot be the vision tower: its {first} and {name} are "
                "one weight, and safetensors stores no weight under two names. Use another architecture."
            )


def _tower_width(tower: Any, levels: list[int]) -> int:
    """Return the width of a vision tower's pooled output and of the stages in `vision_levels` together."""
    timm_model, name = tower.timm_model, tower.config.architecture
    # Not num_features: some heads (MobileNetV3, GhostNet) end in a wider convolution of their own.
    width: int = timm_model.head_hidden_size
    if not levels:
        return width
    if not hasattr(timm_model, "forward_intermediates"):
        raise ValueError(f"vision_levels cannot be used: timm's {name} returns no feature maps; leave it out.")
    widths = [stage["num_chs"] for stage in timm_model.feature_info]
    if levels[-1] >= len(widths):
        raise ValueError(f"vision_levels={levels} is not allowed: {name} has stages 0 to {len(widths) - 1}.")
    return width + sum(widths[level] for level in levels)


class ClipMiniTextHalf(ClipMiniPreTrainedModel):
    """The caption half: text encoder, pooling over the real tokens, projection."""

    def _add_text_tower(self) -> None:
        tower = self.config.text_config
        is_siglip = isinstance(tower, SiglipTextConfig)  # which AutoModel does not know, up to transformers 5.24
        self.text_model = SiglipTextModel(tower) if is_siglip else AutoModel.from_config(tower)
        _drop_pooling(self.text_model)
        self.text_projection = self._make_projection(self.config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """Return the text tower's word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's word embeddings."""
        self.text_model.set_input_embeddings(value)

    def freeze_text_tower(self) -> None:
        """Freeze the text tower and keep it in eval mode; its projection stays trainable."""
        self.text_model.requires_grad_(False)
        self.train(self.training)

    def pool_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run only the text tower and pool its tokens: (T, L) to (T, W), which `pooled_text` takes."""
        return self._run_text_tower(input_ids, attention_mask)["pooler_output"]

    def _run_text_tower(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run the text tower; `pooler_output` is (T, W)."""
        input_ids, attention_mask = self._cut_to_positions(input_ids, attention_mask)
        if self.config.text_padding_id is not None:
            input_ids, attention_mask = self._pad_to_positions(input_ids, attention_mask), None
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._pool_text(outputs.last_hidden_state, input_ids, attention_mask),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
        )

    def _cut_to_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cut captions to the number of positions that the tower has, and keep their closing token as the last.

        The processor has done so already. transformers' zero-shot pipeline, however, pads its labels without cutting
        them, and one long label would crash the tower.
        """
        positions = self.config.max_text_tokens
        if positions is None or input_ids.shape[1] <= positions:
            return input_ids, attention_mask
        logger.warning_once(f"A text of {input_ids.shape[1]} tokens was cut to the {positions} that the model reads.")
        if attention_mask is None:
            return torch.cat([input_ids[:, : positions - 1], input_ids[:, -1:]], dim=1), None
        # Padding comes last, so the mask's sum tells where the closing token is. A caption that fits has none to move:
        # it keeps the token that is in the last position anyway.
        last = (attention_mask.sum(dim=1, keepdim=True) - 1).clamp(min=positions - 1)  # (T, 1)
        closing = input_ids.gather(1, last)
        return torch.cat([input_ids[:, : positions - 1], closing], dim=1), attention_mask[:, :positions]

    def _pad_to_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Pad captions, (T, L), to all positions that the tower has, with the token that it was trained with."""
        padding: Any = self.config.text_padding_id  # not the tokenizer's: Trainer writes that into the tower's config
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, padding)
        num_missing = (self.config.max_text_tokens or 0) - input_ids.shape[1]
        return torch.cat([input_ids, input_ids.new_full((input_ids.shape[0], num_missing), padding)], dim=1)

    def _pool_text(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Reduce (T, L, W) token states to (T, W): one token, or the mean over tokens that are not padding.

        DistilBERT has no pooler of its own. The mask matters: without it a caption's embedding would depend on the
        length of the other captions in the batch.
        """
        pooling = self.config.text_pooling
        if pooling == "cls":
            return hidden[:, 0]
        if pooling == "eos":
            chosen = (input_ids == self.config.text_config.eos_token_id).int().argmax(dim=1)  # the first of them
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]
        if attention_mask is None:
            return hidden[:, -1] if pooling == "last" else hidden.mean(dim=1)
        if pooling == "last":  # before the padding
            chosen = attention_mask.sum(dim=1).long() - 1
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]
        mask = attention_mask[:, :, None].to(hidden.dtype)  # (T, L, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

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
            input_ids: (T, L) token ids; captions longer than the tower can read are cut.
            attention_mask: (T, L), 1 for tokens and 0 for padding; None means no padding.
            pooled_text: (T, W) outputs of `pool_texts`, computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`; others as in
                `get_image_features`.

        Returns:
            The tower's output; its `pooler_output` is the projection, (T, D), not yet of length 1.

        Raises:
            TypeError: there is no such argument.
        """
        options = self._select_tower_options(kwargs)
        if pooled_text is None and input_ids is not None:
            outputs = self._run_text_tower(input_ids, attention_mask, **options)
        else:
            outputs = BaseModelOutputWithPooling(pooler_output=pooled_text)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)  # (T, W) to (T, D)
        return outputs

    def embed_captions(self, batch: list[str]) -> Tensor:
        """Embed n captions as (n, D), not yet of length 1."""
        inputs = self.processor(text=batch).to(self.device)
        return self.get_text_features(**inputs, return_dict=True).pooler_output

    def encode_text(
        self,
        texts: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray | Tensor:
        """Embed raw captions with the model's own processor.

        Args:
            texts: a string or any iterable of strings; what is longer than the model can read is cut. Captions of
                similar length are batched together, the longest first, to save padding; the result keeps the order
                given.
            batch_size: captions per forward pass.
            show_progress_bar: as in `encode_image`.
            convert_to_tensor: as in `encode_image`.
            truncate_dim: as in `encode_image`.

        Returns:
            (T, D) or (T, truncate_dim) float32, rows of length 1; a single row for one string outside a list.

        Raises:
            ValueError: an input is not a string, or an argument is out of range.
        """
        return encode(
            self,
            [self.text_model, self.text_projection],  # to look at the vision tower's mode takes a while too
            texts,
            (str,),
            lambda _, text: text,
            self.embed_captions,
            by_length,
            batch_size,
            show_progress_bar,
            convert_to_tensor,
            truncate_dim,
        )


class ClipMiniVisionModel(ClipMiniVisionHalf):
    """The image half alone. It loads from a whole checkpoint without reading the text tower's weights."""

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_"]  # noqa: RUF012

    def __init__(self, config: ClipMiniConfig) -> None:
        super().__init__(config)
        self._add_vision_tower()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ClipMiniVisionOutput:
        """Embed `pixel_values`, (I, 3, height, width), as `image_embeds`, (I, D) of length 1."""
        outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        return ClipMiniVisionOutput(
            image_embeds=normalize(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
        )


class ClipMiniTextModel(ClipMiniTextHalf):
    """The caption half alone. It loads from a whole checkpoint without reading the vision tower's weights."""

    main_input_name = "input_ids"
    input_modalities = ["text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_"]  # noqa: RUF012

    def __init__(self, config: ClipMiniConfig) -> None:
        super().__init__(config)
        self._add_text_tower()
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> ClipMiniTextOutput:
        """Embed the captions in `input_ids`, (T, L), as `text_embeds`, (T, D) of length 1."""
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
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))  # the logarithm, as in CLIP
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
        """Return the logit scale itself, which is the inverse temperature: a scalar in (0, logit_scale_max]."""
        log_max = math.log(self.config.logit_scale_max)
        if not self.training:
            return self.logit_scale.clamp(max=log_max).exp()
        # Clip the parameter itself, as CLIP does: past the limit, `clamp` would pass no gradient to bring it back.
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
            image_ids: (B,) integers that say which image each pair shows; pairs with the same id are positives of each
                other in the loss. None means that every pair shows an image of its own.
            return_loss: compute the loss if there are as many images as captions, row i of both being pair i. True by
                default, because Trainer infers from the default whether a model has a loss.
            return_logits: compare images and captions. If False, only embeddings are returned: for a large batch the
                (I, T) logits would take more memory than everything else.
            pooled_image: (I, V) outputs of `pool_images`, in place of `pixel_values`.
            pooled_text: (T, W) outputs of `pool_texts`, in place of `input_ids`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. `labels`, `token_type_ids` and
                `num_items_in_batch`, which Trainer and other libraries' collators pass along, are ignored.

        Returns:
            ClipMiniOutput; given only images or only captions, their embeddings without logits.

        Raises:
            TypeError: there is no such argument.
            ValueError: there are neither images nor captions, or `image_ids` is not one id per pair.
        """
        has_image = pixel_values is not None or pooled_image is not None
        has_text = input_ids is not None or pooled_text is not None
        if not has_image and not has_text:
            raise ValueError("There is nothing to embed: pass pixel_values, input_ids or both.")
        vision_output: Any = None
        text_output: Any = None
        images = texts = logits = loss = None
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
        side_vision_model_name_or_path: str | None = None,
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **config: Any,
    ) -> "ClipMiniModel":
        """Join pretrained towers; the projections and the temperature are new and must be trained.

        Args:
            vision_model_name_or_path: a timm model: Hub id ("timm/resnet50.a1_in1k") or local folder.
            text_model_name_or_path: a text encoder: Hub id ("distilbert/distilbert-base-uncased") or local folder.
            side_vision_model_name_or_path: a second timm model, which sees the same pixels beside the first.
            vision_kwargs: passed to the vision towers' `from_pretrained`: `revision`, `token`, `cache_dir`, ...
            text_kwargs: the same for the text tower.
            **config: fields of [`ClipMiniConfig`]: `projection_dim`, `loss`, ...

        Returns:
            The model, in eval mode and float32, with every pretrained weight unchanged.

        Raises:
            ValueError: a vision tower is not a timm model, or the side tower needs other pixels; a checkpoint lacks
                weights of its tower; or the config has no such field.
        """
        fields = inspect.signature(ClipMiniConfig.__init__).parameters
        known = [name for name in fields if name not in ClipMiniConfig.sub_configs]
        if unknown := config.keys() - set(known):
            raise ValueError(f"ClipMiniConfig has no field {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
        vision_kwargs, text_kwargs = dict(vision_kwargs or {}), dict(text_kwargs or {})
        config["text_config"] = AutoConfig.from_pretrained(text_model_name_or_path, **text_kwargs)
        vision_names = {"vision_config": vision_model_name_or_path}
        if side_vision_model_name_or_path is not None:
            vision_names["side_vision_config"] = side_vision_model_name_or_path
        for field, name in vision_names.items():
            config[field] = AutoConfig.from_pretrained(name, **vision_kwargs)
            if not isinstance(config[field], TimmWrapperConfig):
                raise ValueError(f"{name!r} is not a timm model; name one, such as 'timm/resnet50.a1_in1k'.")
        model = cls(ClipMiniConfig(**config))
        text_kwargs["config"] = model.config.text_config
        # Set after construction, since `post_init` would have initialized them anew.
        towers = []
        for field, name in vision_names.items():
            options = {**vision_kwargs, "config": getattr(model.config, field)}
            towers.append(_load_tower(TimmWrapperModel, name, options))
            fold_batch_norms(towers[-1].timm_model)
        model.vision_model = towers[0]
        if towers[1:]:
            model.vision_model.side = towers[1]
        model.text_model = _load_tower(AutoModel, text_model_name_or_path, text_kwargs)
        _drop_pooling(model.text_model)
        return model.eval()


def _drop_pooling(text_model: Any) -> None:
    """Remove BERT's pooler and SigLIP's head: since we pool and project ourselves, they would get no gradient."""
    if hasattr(text_model, "pooler"):
        text_model.pooler = None
    if hasattr(text_model, "head"):
        text_model.head = nn.Identity()


def _load_tower(auto_class: Any, path: str, options: dict[str, Any]) -> Any:
    """Load a pretrained tower in float32 from safetensors, and check that the checkpoint holds all its weights."""
    options = {"dtype": torch.float32, **options, "output_loading_info": True}
    # A shard index can name pickles, and the tower classes, unlike ours, do not check it.
    source = {name: options[name] for name in (*SOURCE_OPTIONS, "token") if options.get(name) is not None}
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **source)
    if index:
        _refuse_pickles(get_checkpoint_shard_files(path, index, **source)[0])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # unused weights of a classifier are expected, and missing ones raise below
    try:
        tower, info = _load_safetensors(auto_class.from_pretrained, path, **options)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # we pool ourselves
    if missing:
        raise ValueError(
            f"{path!r} lacks weights of its own model, among them {missing[0]!r}; they would be random. "
            "Is it the right checkpoint?"
        )
    return tower
