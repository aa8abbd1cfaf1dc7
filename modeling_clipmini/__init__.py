"""clipmini's model: config, dual encoder, losses and processor.

Importing this package registers the classes with transformers' Auto classes. Every file of this folder but this one is
uploaded with each trained model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from .configuration_clipmini import ClipMiniConfig
from .loss_clipmini import infonce_loss, sigmoid_loss
from .modeling_clipmini import (
    ClipMiniModel,
    ClipMiniOutput,
    ClipMiniPreTrainedModel,
    ClipMiniTextModel,
    ClipMiniTextOutput,
    ClipMiniVisionModel,
    ClipMiniVisionOutput,
)
from .processing_clipmini import ClipMiniProcessor

__all__ = [
    "ClipMiniConfig",
    "ClipMiniModel",
    "ClipMiniOutput",
    "ClipMiniPreTrainedModel",
    "ClipMiniProcessor",
    "ClipMiniTextModel",
    "ClipMiniTextOutput",
    "ClipMiniVisionModel",
    "ClipMiniVisionOutput",
    "infonce_loss",
    "sigmoid_loss",
]

AutoConfig.register(ClipMiniConfig.model_type, ClipMiniConfig)
AutoModel.register(ClipMiniConfig, ClipMiniModel)
AutoModelForZeroShotImageClassification.register(ClipMiniConfig, ClipMiniModel)
AutoProcessor.register(ClipMiniConfig, ClipMiniProcessor)

# What `save_pretrained` writes into `auto_map`, together with the code files.
ClipMiniConfig.register_for_auto_class()
ClipMiniModel.register_for_auto_class("AutoModel")
ClipMiniVisionModel.register_for_auto_class("AutoModel")
ClipMiniTextModel.register_for_auto_class("AutoModel")
ClipMiniProcessor.register_for_auto_class()
