"""ClipMiniConfig: two tower configs and what joins them."""

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 8):  # this file is the first that any loader imports
    raise ImportError(
        f"clipmini models need transformers 5.8 or newer, and {transformers.__version__} is installed: "
        'pip install --upgrade "transformers>=5.8".'
    )

from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig

PROJECTIONS = ("linear", "mlp")
TEXT_POOLINGS = ("mean", "cls", "eos", "last")
LOSSES = ("infonce", "sigmoid")

# Initial values for each loss: CLIP section 2.5 (temperature 0.07) and SigLIP section 3.2 (t' = log 10, b = -10).
LOGIT_SCALE_INITS = {"infonce": math.log(1 / 0.07), "sigmoid": math.log(10.0)}
SIGMOID_LOGIT_BIAS_INIT = -10.0

# The arguments of timm's `create_model` that a tower's config may set: those that describe the architecture. Others,
# present or future, may name a file that is unpickled (`checkpoint_path`), an address, pretrained weights or code. A
# config comes with a model, and a model's files must stay data.
TIMM_MODEL_ARGS = (
    *("img_size", "patch_size", "in_chans", "global_pool", "output_stride", "features_only"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"),
    *("patch_drop_rate", "embed_dim", "embed_dims", "depth", "depths", "dims", "layers", "channels", "widths"),
    *("num_heads", "num_kv_heads", "head_dim", "window_size", "mlp_ratio", "mlp_ratios", "expand_ratio"),
    *("kernel_size", "cardinality", "base_width", "stem_type", "stem_width", "stem_size", "avg_down"),
    *("num_features", "out_features", "qkv_bias", "qk_norm", "init_values", "ls_init_value"),
    *("layer_scale_init_value", "norm_eps", "pre_norm", "final_norm", "fc_norm", "act_layer", "norm_layer"),
    *("aa_layer", "mlp_layer", "weight_init", "pos_embed", "class_token", "reg_tokens", "no_embed_class"),
    *("use_abs_pos_emb", "use_rel_pos_bias", "use_rot_pos_emb", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "always_partition", "conv_bias", "pad_type"),
)
TIMM_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_.-]+)?")  # not `hf-hub:...`, which fetches another config

# RoBERTa and its kin number positions from the padding token's id on, so they read fewer tokens than their table has
# rows.
POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert"),
    *("mpnet", "data2vec-text", "xmod", "ibert", "longformer", "luke"),
)


class ClipMiniConfig(PreTrainedConfig):
    """Configuration of a [`ClipMiniModel`].

    Args:
        vision_config: a `TimmWrapperConfig`, or its dict: the timm architecture and its `pretrained_cfg` (mean, std,
            interpolation, crop). The classifier and its label names are dropped: a tower has no classes.
        side_vision_config: a second timm tower, in the same form; none by default. It sees the same pixels, and its
            pooled output is appended to the first one's.
        text_config: the config of any encoder that `AutoModel` builds, or its dict. DistilBERT by default.
        projection_dim: width of the shared space, at least 1.
        projection: "linear" (one matrix, as in CLIP) or "mlp" (linear, GELU, linear, dropout, residual, LayerNorm).
        projection_bias: whether the "linear" projections add a bias, as in SigLIP; CLIP's do not.
        projection_dropout: dropout of the "mlp" projection, in [0, 1).
        vision_levels: stages of the vision tower, numbered as in timm's `out_indices`, such as [2, 3, 4]; none by
            default. Their feature maps, averaged over the image, are appended to each tower's pooled output. Early
            stages know colors and textures that the last one, trained to name objects, has dropped.
        vision_dropout: dropout of the pooled image features before the projection, in [0, 1).
        text_pooling: "mean" over the caption's tokens; "cls", its first token; "eos", the first token whose id is the
            text tower's `eos_token_id` (CLIP); or "last", its last token (SigLIP).
        text_padding_id: id of the token with which captions are padded to all positions that the text tower has, and
            which it reads like any other, as SigLIP and MobileCLIP2 were trained. None, the default: captions are
            padded to the longest of a batch, and the tower does not see the padding.
        loss: "infonce" (CLIP) or "sigmoid" (SigLIP).
        logit_scale_init_value: initial value of the learnable *logarithm* of the logit scale (CLIP's public name). By
            default log(1 / 0.07) = 2.659 for "infonce" and log(10) for "sigmoid".
        logit_scale_max: upper limit of the logit scale itself, after `exp`, at least 1; CLIP clips at 100.
        logit_bias_init_value: initial value of the learnable bias of the "sigmoid" loss, -10 by default; "infonce" has
            none, since a softmax ignores it.
        vision_embed_dim: width of the pooled image features, including those of `vision_levels` and the side tower. By
            default the model reads it off the towers and stores it here, so that loading on the meta device needs no
            forward pass.

    Raises:
        ValueError: a value is not allowed; the message names the field and what is.
    """

    model_type = "clipmini"
    # `Trainer.predict` keeps only embeddings: logits compare a single batch, and hidden states would fill the memory.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers' API, as are the other mutable ones
        *("logits_per_image", "logits_per_text", "text_model_output", "vision_model_output"),
        *("last_hidden_state", "hidden_states", "attentions"),
    ]
    sub_configs = {  # noqa: RUF012 - transformers' API
        "vision_config": TimmWrapperConfig,
        "side_vision_config": TimmWrapperConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | TimmWrapperConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        projection_dim: int = 256,
        projection: str = "linear",
        projection_bias: bool = False,
        projection_dropout: float = 0.1,
        vision_levels: list[int] | None = None,
        vision_dropout: float = 0.0,
        text_pooling: str = "mean",
        text_padding_id: int | None = None,
        loss: str = "infonce",
        logit_scale_init_value: float | None = None,
        logit_scale_max: float = 100.0,
        logit_bias_init_value: float | None = None,
        vision_embed_dim: int | None = None,
        side_vision_config: dict[str, Any] | TimmWrapperConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _without_folder(_tower_vision_config("vision_config", vision_config))
        self.side_vision_config = None
        if side_vision_config is not None:
            self.side_vision_config = _without_folder(_tower_vision_config("side_vision_config", side_vision_config))
        self.text_config = _without_folder(_tower_text_config(text_config))
        self.projection_dim = _at_least_one("projection_dim", projection_dim)
        self.projection = _one_of("projection", projection, PROJECTIONS)
        self.projection_bias = _one_of("projection_bias", projection_bias, (False, True))
        self.projection_dropout = _in_range("projection_dropout", projection_dropout, 0.0, 1.0, include_high=False)
        self.vision_levels = _check_levels(vision_levels)
        self.vision_dropout = _in_range("vision_dropout", vision_dropout, 0.0, 1.0, include_high=False)
        self.text_pooling = _one_of("text_pooling", text_pooling, TEXT_POOLINGS)
        self.text_padding_id = text_padding_id
        self._check_text_ids()
        self.loss = _one_of("loss", loss, LOSSES)
        self.logit_scale_max = _in_range("logit_scale_max", logit_scale_max, 1.0, math.inf, include_high=False)
        if logit_scale_init_value is None:
            logit_scale_init_value = LOGIT_SCALE_INITS[loss]
        self.logit_scale_init_value = _in_range(
            "logit_scale_init_value", logit_scale_init_value, -math.inf, math.log(self.logit_scale_max)
        )
        self.logit_bias_init_value = None
        if self.loss == "sigmoid":
            if logit_bias_init_value is None:
                logit_bias_init_value = SIGMOID_LOGIT_BIAS_INIT
            self.logit_bias_init_value = _in_range(
                "logit_bias_init_value", logit_bias_init_value, -math.inf, math.inf, include_high=False
            )
        elif logit_bias_init_value is not None:
            raise ValueError(
                f"logit_bias_init_value={logit_bias_init_value!r} has no effect with loss='infonce', which learns no "
                "bias; leave it out, or use loss='sigmoid'."
            )
        self.vision_embed_dim = (
            None if vision_embed_dim is None else _at_least_one("vision_embed_dim", vision_embed_dim)
        )
        super().__init__(**kwargs)

    def _check_text_ids(self) -> None:
        tower, padding = self.text_config, self.text_padding_id
        if padding is not None and (isinstance(padding, bool) or not isinstance(padding, int) or padding < 0):
            raise ValueError(f"text_padding_id={padding!r} is not allowed; use a token's id, or null.")
        needed = {
            "max_position_embeddings": "text_padding_id" if padding is not None else None,
            "eos_token_id": "text_pooling='eos'" if self.text_pooling == "eos" else None,
        }
        for name, field in needed.items():
            if field and not isinstance(getattr(tower, name, None), int):
                raise ValueError(
                    f"{field} needs a text tower with {name}, which this {type(tower).__name__} lacks: set it in "
                    "text_config, or leave the field out."
                )

    @property
    def max_text_tokens(self) -> int | None:
        """Return how many tokens the text tower can read, or None if it has no table of positions."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is not None and self.text_config.model_type in POSITIONS_AFTER_PADDING:
            positions -= (self.text_config.pad_token_id or 0) + 1
        return positions


def _tower_vision_config(field: str, config: Any) -> TimmWrapperConfig:
    """Return a timm config without its classifier, whose 1000 label names would fill config.json for nothing."""
    if not isinstance(config, (dict, TimmWrapperConfig, type(None))):
        raise ValueError(
            f"{field} is a {type(config).__name__}; the vision tower must be a timm model: pass a "
            "TimmWrapperConfig, for example TimmWrapperConfig(architecture='resnet50'), or its dict."
        )
    values = config.to_dict() if isinstance(config, TimmWrapperConfig) else dict(config or {})
    _check_architecture(field, values)
    # timm's own save_for_hf writes its arguments there; TimmWrapperModel passes num_classes itself.
    model_args = {key: value for key, value in (values.get("model_args") or {}).items() if key != "num_classes"}
    values = {**values, "num_classes": 0, "label_names": [], "model_args": model_args or None}
    tower = _build(field, TimmWrapperConfig.from_dict, values)
    if not tower.do_pooling or model_args.get("features_only"):
        raise ValueError(
            f"{field} must give a pooled output: do_pooling=False and model_args={{'features_only': True}} do not."
        )
    return tower


def _check_architecture(field: str, values: dict[str, Any]) -> None:
    """Raise if a timm config does more than describe an architecture that timm knows by name."""
    architecture, model_args = values.get("architecture", ""), values.get("model_args") or {}
    if not isinstance(architecture, str) or (architecture and not TIMM_ARCHITECTURE.fullmatch(architecture)):
        raise ValueError(
            f"{field}.architecture={architecture!r} is not allowed; use a name from timm, such as 'resnet50'."
        )
    if not isinstance(model_args, dict):
        raise ValueError(f"{field}.model_args={model_args!r} is not allowed; use a dict.")
    for key, value in model_args.items():
        if key not in (*TIMM_MODEL_ARGS, "num_classes"):
            raise ValueError(
                f"{field}.model_args[{key!r}] is not allowed: it may name a file, an address, weights or code. "
                f"A tower is described by {', '.join(TIMM_MODEL_ARGS)}."
            )
        if not _is_plain(value):
            raise ValueError(
                f"{field}.model_args[{key!r}]={value!r} is not allowed; use numbers, names, or lists of these."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _tower_text_config(config: Any) -> PreTrainedConfig:
    if not isinstance(config, (dict, PreTrainedConfig, type(None))):
        raise ValueError(f"text_config is a {type(config).__name__}; pass a text encoder's config or its dict.")
    if not isinstance(config, PreTrainedConfig):
        values = {"model_type": "distilbert", **(config or {})}
        config = _build("text_config", lambda values: AutoConfig.for_model(**values), values)
    if config.is_encoder_decoder:
        raise ValueError(f"text_config is a {type(config).__name__}, an encoder-decoder; pass an encoder's config.")
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"text_config is a {type(config).__name__} without a hidden_size; pass a text encoder's.")
    return config


def _without_folder(tower: Any) -> Any:
    """Return a tower's config without the local folder it came from, which config.json would reveal to everyone."""
    name = tower.name_or_path or ""
    if os.path.isabs(name) or os.path.isdir(name):
        tower = copy.deepcopy(tower)  # the caller's config is left alone
        tower.name_or_path = ""
    return tower


def _check_levels(levels: Any) -> list[int]:
    """Return `vision_levels` sorted; whether the tower has such stages is checked when it is built."""
    levels = [] if levels is None else levels
    is_list = isinstance(levels, (list, tuple))
    if not is_list or any(isinstance(level, bool) or not isinstance(level, int) or level < 0 for level in levels):
        raise ValueError(f"vision_levels={levels!r} is not allowed; use stages counted from 0, such as [2, 3, 4].")
    return sorted(set(levels))


def _build(field: str, build: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> Any:
    """Build a library's config, and name the field if a value of the wrong type raises one of many errors."""
    try:
        return build(values)
    except Exception as error:
        raise ValueError(f"{field} is not allowed: {' '.join(str(error).split())}") from error


def _one_of(field: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not allowed; use one of {', '.join(map(repr, allowed))}.")
    return value


def _at_least_one(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} is not allowed; use a whole number of at least 1.")
    return value


def _in_range(field: str, value: Any, low: float, high: float, include_high: bool = True) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high if include_high else low <= value < high) or math.isinf(value):
        end = "to" if include_high else "to below"
        raise ValueError(f"{field}={value!r} is not allowed; use a finite number from {low:g} {end} {high:g}.")
    return float(value)
