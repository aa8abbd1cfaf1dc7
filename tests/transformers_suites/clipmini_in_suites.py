"""clipmini in transformers' own test suites; test_transformers_suites.py copies this file beside them and runs it."""

import os
import unittest
from pathlib import Path

import torch
from huggingface_hub import ZeroShotImageClassificationOutputElement
from PIL import Image
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_processing_common import ProcessorTesterMixin
from transformers import (
    CLIPImageProcessor,
    FeatureExtractionPipeline,
    ImageFeatureExtractionPipeline,
    ZeroShotImageClassificationPipeline,
)
from transformers.testing_utils import compare_pipeline_output_to_hub_spec, torch_device

from clipmini.training.build import character_tokenizer
from modeling_clipmini import (
    ClipMiniConfig,
    ClipMiniModel,
    ClipMiniProcessor,
    ClipMiniTextModel,
    ClipMiniVisionModel,
)
from tests import test_pipeline_mixin

# A class of the library has no code to upload with it.
ClipMiniProcessor._auto_class = None

IMAGE_SIZE, PATCH_SIZE = 32, 16
TEXT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
MODEL_ARGS = {"img_size": IMAGE_SIZE, "embed_dim": 64, "num_heads": 2}


def make_config(vision):
    text = {**TEXT, "vocab_size": len(character_tokenizer())}
    return ClipMiniConfig(vision_config=vision, text_config=text, projection_dim=16)


class Tester:
    """What the suites ask of a model's author: a small config, inputs, and what to expect."""

    batch_size, is_training, num_blocks = 4, True, 2
    input_names: tuple[str, ...]

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        model_args = {**MODEL_ARGS, "depth": self.num_blocks}
        return make_config({"architecture": "vit_tiny_patch16_224", "model_args": model_args})

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        attention_mask = torch.ones(self.batch_size, 7, dtype=torch.long)
        attention_mask[-1, 4:] = 0
        inputs = {
            "input_ids": torch.randint(5, 70, (self.batch_size, 7), generator=generator),
            "attention_mask": attention_mask,
            "pixel_values": torch.randn(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        }
        return self.get_config(), {name: inputs[name].to(torch_device) for name in self.input_names}


class TextTester(Tester):
    input_names = ("input_ids", "attention_mask")
    seq_length, hidden_size, num_hidden_layers, num_attention_heads = 7, 32, 2, 2


class VisionTester(Tester):
    """timm gives a map for each block, and none for what goes into the first; a map is (B, C, height, width)."""

    input_names = ("pixel_values",)
    seq_length = hidden_size = IMAGE_SIZE // PATCH_SIZE

    def __init__(self, parent, num_blocks=2):
        super().__init__(parent)
        self.num_blocks = self.num_hidden_layers = self.expected_num_hidden_layers = num_blocks


class WholeTester(TextTester):
    input_names = ("input_ids", "attention_mask", "pixel_values")
    num_blocks = 3  # as many maps as the text tower has: a list of hidden states to give is for both

    def __init__(self, parent):
        super().__init__(parent)
        self.text_model_tester, self.vision_model_tester = TextTester(parent), VisionTester(parent, self.num_blocks)


class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ClipMiniModel,)
    additional_model_inputs = ("pixel_values",)
    test_can_init_all_missing_weights_before_2023 = True  # it looks for a year in a license's head
    _is_composite = True

    def setUp(self):
        self.model_tester = WholeTester(self)
        self.config_tester = ConfigTester(
            self, config_class=ClipMiniConfig, has_text_modality=False, common_properties=["projection_dim"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class VisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ClipMiniVisionModel,)
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False

    def setUp(self):
        self.model_tester = VisionTester(self)


class TextModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ClipMiniTextModel,)
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = TextTester(self)


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ClipMiniProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 18, "width": 18})

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = character_tokenizer()
        tokenizer.model_max_length = 64
        return tokenizer


class PipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {  # noqa: RUF012
        "zero-shot-image-classification": ClipMiniModel,
        "image-feature-extraction": ClipMiniVisionModel,
        "feature-extraction": ClipMiniTextModel,
    }

    @classmethod
    def setUpClass(cls):
        """Save the models where the suite looks for them."""
        config = make_config({"architecture": "test_resnet"})
        for model_class in cls.pipeline_model_mapping.values():
            folder = Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"], config.model_type, model_class.__name__)
            ClipMiniModel(config).save_pretrained(folder)
            ClipMiniProcessor.from_towers(config, character_tokenizer()).save_pretrained(folder)


class PipelineCase(unittest.TestCase):
    """The pipelines' own tests are not in the source archive: these stand for them."""

    pipeline_class: type
    examples: tuple

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32"):
        pipeline = self.pipeline_class(model=model, tokenizer=tokenizer, image_processor=image_processor, dtype=dtype)
        return pipeline, list(self.examples)

    def run_pipeline_test(self, pipeline, examples):
        for output in (pipeline(examples[0]), *pipeline(examples)):
            self.check(output)


IMAGES = (Image.new("RGB", (50, 40), "red"), Image.linear_gradient("L"))


LABELS = ("red", "a very long label " * 100)


class LabeledPipeline(ZeroShotImageClassificationPipeline):
    """The suite knows no labels."""

    def __call__(self, image, candidate_labels=LABELS, **kwargs):
        return super().__call__(image, candidate_labels=list(candidate_labels), **kwargs)


class ZeroShotCase(PipelineCase):
    pipeline_class, examples = LabeledPipeline, IMAGES

    def check(self, output):
        assert {score["label"] for score in output} == set(LABELS)
        assert abs(sum(score["score"] for score in output) - 1) < 0.01
        for score in output:
            compare_pipeline_output_to_hub_spec(score, ZeroShotImageClassificationOutputElement)


class EmbeddingCase(PipelineCase):
    def check(self, output):
        embedding = torch.tensor(output).float()
        assert embedding.numel() == 16
        assert abs(embedding.norm() - 1) < 0.01


class ImageCase(EmbeddingCase):
    pipeline_class, examples = ImageFeatureExtractionPipeline, IMAGES


class TextCase(EmbeddingCase):
    pipeline_class, examples = FeatureExtractionPipeline, ("a cat", "a somewhat longer caption")


for task, case in (
    ("zero-shot-image-classification", ZeroShotCase),
    ("image-feature-extraction", ImageCase),
    ("feature-extraction", TextCase),
):
    test_pipeline_mixin.pipeline_test_mapping[task] = {"test": f"{__name__}.{case.__name__}"}
# It compares transformers' documentation with huggingface_hub's: no model is in it, and the two differ at present.
del test_pipeline_mixin.task_to_pipeline_and_spec_mapping["zero-shot-image-classification"]
