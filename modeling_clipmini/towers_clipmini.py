"""The two halves of the dual encoder: a tower each, its pooled output, and a projection into the shared space.

Shape letters used in the comments:
    B pairs, I images, T captions (I = T = B in training), L tokens of the longest caption,
    V width of the vision tower's pooled output, W width of the text tower, D width of the shared space.
"""

from os import PathLike
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, TimmWrapperModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .base_clipmini import ClipMiniPreTrainedModel, ClipMiniTextOutput, ClipMiniVisionOutput, normalise
from .configuration_clipmini import ClipMiniConfig
from .encoding_clipmini import encode
from .images_clipmini import image_size, read_image, read_named
from .processing_clipmini import ClipMiniProcessor  # noqa: F401 - as in modeling_clipmini.py

logger = logging.get_logger(__name__)


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
        """Embed images, before normalisation.

        Args:
            pixel_values: (I, 3, height, width), normalised as the processor does.
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
        """Embed pictures as they are, with the model's own processor.

        Args:
            images: a Pillow image, a path or an http(s) address, or any iterable of these, which is read a batch at a
                time, as `read_image` does: upright, what is transparent white, within limits.
            batch_size: pictures per forward.
            show_progress_bar: draw one, or not; None draws it for what takes over two seconds.
            convert_to_tensor: give a tensor on the model's device rather than an array.
            truncate_dim: keep the first so many dimensions, for models trained with such widths (Matryoshka).

        Returns:
            (I, D) or (I, truncate_dim) float32, rows of length 1; one row alone for one picture that is not in a list.

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
        length of its neighbours in the batch.
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
        """Embed captions, before normalisation.

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
            image_embeds=normalise(outputs.pooler_output),
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
            text_embeds=normalise(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
