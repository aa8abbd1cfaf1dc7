"""Random views of images, each a pure function of its seed.

A model that sees the same view of an image in every epoch memorizes the image. Training therefore shows it random
crops, some of them mirrored.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision
import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

FLIPS = ("safe", "always", "never")
# A letter before or after makes it another word (bright, leftover); a hyphen or an underscore does not.
SIDE = re.compile(r"(?<![^\W\d_])(?:left|right)(?:most|wards?|hand(?:ed)?)?(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True)
class ImageAugmentation:
    """How training images are augmented. Colors stay, since captions name them.

    Attributes:
        crop_scale: smallest share of the image's area that a random crop keeps, above 0. At 1 there is no random crop,
            and the image is resized and cropped as in inference.
        flip: mirror images with probability 1/2: "safe" those without a caption that says left or right, "always" all,
            "never" none.
        resolution: shorter edge of a view in pixels; None for that of inference. A lower one is faster and often no
            worse, since random crops show things larger than inference does (the FixRes effect, Touvron et al. 2019,
            https://arxiv.org/abs/1906.06423).

    Raises:
        ValueError: a value is out of range.
    """

    crop_scale: float = 0.35
    flip: str = "safe"
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be above 0 and at most 1, where images are not cropped at random."
            )
        if self.flip not in FLIPS:
            raise ValueError(f"flip={self.flip!r} is unknown; use {', '.join(FLIPS)}.")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(
                f"resolution={self.resolution} must be at least 1 pixel; leave it out for the model's own."
            )


class ImageAugmenter:
    """Draw a random view of an image.

    The same arguments give the same pixels in every worker, process and resumed run. Torch's random state is changed
    during a call and restored after it, so threads must not call it at the same time.

    Args:
        image_processor: the stock image processor of the model's processor; resizes, crops and normalizes.
        augmentation: how to augment images.
    """

    def __init__(self, image_processor: Any, augmentation: ImageAugmentation) -> None:
        self.image_processor = image_processor
        self.augmentation = augmentation
        settings = image_processor.to_dict()
        shorter = min(settings["crop_size"].values())
        resolution = augmentation.resolution or shorter
        self.size = _scale(settings["size"], resolution, shorter)
        self.crop_size = _scale(settings["crop_size"], resolution, shorter)
        self.crop: v2.RandomResizedCrop | None = None
        if augmentation.crop_scale < 1:
            edges = (self.crop_size["height"], self.crop_size["width"])
            self.crop = v2.RandomResizedCrop(edges, scale=(augmentation.crop_scale, 1.0))

    def __call__(self, image: Image.Image, captions: Sequence[str], seed: int) -> Tensor:
        """Draw a view as `draw` does, normalized as in inference: (3, height, width) float32."""
        return normalize_pixels(self.image_processor, self.draw(image, captions, seed)[None])[0]

    def draw(self, image: Image.Image, captions: Sequence[str], seed: int) -> Tensor:
        """Draw a view without normalizing it, in a quarter of the memory.

        Args:
            image: an image of mode "RGB", from `read_image`.
            captions: all captions of the image, since a cached view is trained with each of them.
            seed: any integer; another one draws another view.

        Returns:
            (3, height, width) uint8.
        """
        # Torch's CPU generator would ignore all but 32 bits of a seed, such as those of an epoch.
        hashed = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`, which also seeds GPUs, whose state is not restored.
            torch.default_generator.manual_seed(int.from_bytes(hashed, "big"))
            geometry: dict[str, Any] = {"size": self.size, "crop_size": self.crop_size}
            if self.crop is not None:
                # torchvision only draws the box; the processor resizes crops exactly as it resizes images.
                box = self.crop.make_params([image])
                left, top = box["left"], box["top"]
                image = image.crop((left, top, left + box["width"], top + box["height"]))
                geometry = {"do_resize": True, "size": self.crop_size, "do_center_crop": False}
            pixels = raw_pixels(self.image_processor, image, **geometry)
            if self.may_flip(captions) and torch.rand(()) < 0.5:
                pixels = pixels.flip(-1)
        return pixels

    def describe(self) -> str:
        """Describe in JSON what the pixels depend on besides the arguments of a call, for the keys of features."""
        parts = {
            # `resolution` is in `crop_size`.
            "augmentation": {key: value for key, value in asdict(self.augmentation).items() if key != "resolution"},
            "crop": repr(self.crop),
            "processor": describe_processor(self.image_processor),
            "crop_size": self.crop_size,  # the size before the crop is in proportion
        }
        return json.dumps(parts, sort_keys=True)

    def may_flip(self, captions: Sequence[str]) -> bool:
        """Return whether views of an image with these captions are mirrored at random."""
        flip = self.augmentation.flip
        return flip == "always" or (flip == "safe" and not names_a_side(captions))


def describe_processor(image_processor: Any) -> str:
    """Describe in JSON what the pixels of a stock image processor depend on: its settings and the libraries."""
    settings = {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}
    versions = {library.__name__: library.__version__ for library in (torch, torchvision, transformers)}
    return json.dumps({**settings, **versions}, sort_keys=True, default=str)


def raw_pixels(image_processor: Any, image: Image.Image, **geometry: Any) -> Tensor:
    """Resize and crop an image as a stock image processor does, without normalizing it.

    Args:
        image_processor: the stock image processor.
        image: an image of mode "RGB".
        **geometry: `size`, `crop_size`, ... in place of the processor's.

    Returns:
        (3, height, width) uint8, as the processor has them before it normalizes.
    """
    options = {**geometry, "do_rescale": False, "do_normalize": False}
    return image_processor(image, return_tensors="pt", **options)["pixel_values"][0]


def normalize_pixels(image_processor: Any, pixels: Tensor) -> Tensor:
    """Normalize resized images as a stock image processor does: (N, 3, height, width) uint8 to float32."""
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    return image_processor(pixels, return_tensors="pt", **options)["pixel_values"]


def names_a_side(captions: Sequence[str]) -> bool:
    """Return whether a caption says left or right, left-hand, leftmost, ..., so that a mirrored image might not fit.

    It knows English alone, and prefers false alarms: "he left the room" and "the right answer" count too.
    """
    return any(SIDE.search(caption) for caption in captions)


def _scale(size: dict[str, int], resolution: int, shorter: int) -> dict[str, int]:
    return {edge: length * resolution // shorter for edge, length in size.items()}
