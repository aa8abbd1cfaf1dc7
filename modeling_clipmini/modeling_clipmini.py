"""ClipMiniModel: a timm image tower and a text tower meeting in one vector space.

Shape letters used in the comments:
    B pairs, I images, T captions (I = T = B in training), L tokens of the longest caption,
    V width of the vision tower's pooled output, W width of the text tower, D width of the shared space.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, TimmWrapperConfig, TimmWrapperModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, can_return_tuple, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .base_clipmini import NO_PICKLES, PLACE_OPTIONS, ClipMiniOutput, load_safetensors, normalise
from .configuration_clipmini import ClipMiniConfig
from .encoding_clipmini import encode  # noqa: F401 - transformers before 5.12 finds, in a local folder, only
from .images_clipmini import read_image  # noqa: F401 - likewise
from .loss_clipmini import infonce_loss, pairwise_logits, sigmoid_loss
from .processing_clipmini import ClipMiniProcessor  # noqa: F401 - what the file that it loads imports itself
from .towers_clipmini import ClipMiniTextHalf, ClipMiniVisionHalf


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
            pixel_values: (I, 3, height, width), normalised as the processor does, or None for captions alone.
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
            images = normalise(vision_output.pooler_output)  # (I, D)
        if has_text:
            text_output = self.get_text_features(input_ids, attention_mask, pooled_text, return_dict=True, **kwargs)
            texts = normalise(text_output.pooler_output)  # (T, D)
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
        # Put in whole, after construction: `post_init` initialises what it finds during it.
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
