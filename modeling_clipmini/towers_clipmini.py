"""The two halves of the dual encoder: a tower each, its pooled output, and a projection into the shared space.

Shape letters used in the comments:
    B pairs, I images, T captions (I = T = B in training), L tokens of the longest caption,
    V width of the vision tower's pooled output, W width of the text tower, D width of the shared space.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, PreTrainedModel, TimmWrapperModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_clipmini import ClipMiniConfig

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoModelForZeroShotImageClassification": "modeling_clipmini.ClipMiniModel",
    "AutoProcessor": "processing_clipmini.ClipMiniProcessor",
}


@dataclass
class ClipMiniOutput(ModelOutput):
    """What the models return; fields that do not apply are None.

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
    """Weights, saving and the two towers' gradient checkpointing, common to the dual encoder and its halves."""

    config: ClipMiniConfig
    config_class = ClipMiniConfig
    base_model_prefix = "clipmini"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' API, as are the other lists
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer must not rescale it by item counts
    _supports_sdpa = True
    _batch_norm_is_frozen = False

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
        _keep_frozen_in_eval(self)
        if self._batch_norm_is_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def _keep_frozen_in_eval(module: nn.Module) -> None:
    """Put every module that has parameters, but none that is trained, into eval mode."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
    else:
        for child in module.children():
            _keep_frozen_in_eval(child)


class ClipMiniVisionHalf(ClipMiniPreTrainedModel):
    """The image half: timm model, pooled output, projection."""

    def _add_vision_tower(self) -> None:
        config = self.config
        self.vision_model = TimmWrapperModel(config.vision_config)
        timm_model = self.vision_model.timm_model
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
        """Embed images, before normalisation.

        Args:
            pixel_values: (I, 3, height, width), normalised as the processor does.
            pooled_image: (I, V) pooled outputs of the vision tower that were computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states` and others, passed to the tower.

        Returns:
            The tower's output; its `pooler_output` is the projection, (I, D), not yet of length 1.
        """
        outputs = BaseModelOutputWithPooling(pooler_output=pooled_image)
        if pooled_image is None:
            kwargs.pop("output_attentions", None)  # timm models give none
            outputs = self._run_vision_tower(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.visual_projection(self.vision_dropout(outputs.pooler_output)),
            hidden_states=outputs.hidden_states,
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
        length of its neighbours in the batch.
        """
        if self.config.text_pooling == "cls":
            return hidden[:, 0]
        if attention_mask is None:
            return hidden.mean(dim=1)
        mask = attention_mask[:, :, None].to(hidden.dtype)  # (T, L, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _cut_to_positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cut captions to the positions that the tower has.

        The processor has done so already; transformers' zero-shot pipeline pads its labels but does not cut them, and
        one long label would crash the tower.
        """
        positions = self.config.max_text_tokens
        if positions is None or input_ids.shape[1] <= positions:
            return input_ids, attention_mask
        logger.warning_once(f"A text of {input_ids.shape[1]} tokens was cut to the {positions} that the model reads.")
        return input_ids[:, :positions], None if attention_mask is None else attention_mask[:, :positions]

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
        """Embed captions, before normalisation.

        Args:
            input_ids: (T, L) token ids; past the tower's last position they are cut.
            attention_mask: (T, L), 1 for tokens and 0 for padding; None means no padding.
            pooled_text: (T, W) pooled outputs of the text tower that were computed earlier; the tower is skipped.
            **kwargs: `output_hidden_states`, `output_attentions` and others, passed to the tower.

        Returns:
            The tower's output; its `pooler_output` is the projection, (T, D), not yet of length 1.
        """
        if pooled_text is None and input_ids is not None:
            input_ids, attention_mask = self._cut_to_positions(input_ids, attention_mask)
            outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            pooled_text = self._pool_text(outputs.last_hidden_state, attention_mask)  # (T, W)
        else:
            outputs = BaseModelOutputWithPooling()
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(pooled_text),
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
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
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ClipMiniOutput:
        """Embed `pixel_values` (I, 3, height, width); `image_embeds` of the output is (I, D), of length 1."""
        outputs = self.get_image_features(pixel_values, **kwargs)
        return ClipMiniOutput(image_embeds=normalise(outputs.pooler_output), vision_model_output=outputs)


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
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> ClipMiniOutput:
        """Embed captions, (T, L) token ids; `text_embeds` of the output is (T, D), of length 1."""
        outputs = self.get_text_features(input_ids, attention_mask, **kwargs)
        return ClipMiniOutput(text_embeds=normalise(outputs.pooler_output), text_model_output=outputs)


def normalise(features: Tensor) -> Tensor:
    """Scale rows to length 1, in float32: (N, D) to (N, D)."""
    return F.normalize(features.float(), dim=-1)
