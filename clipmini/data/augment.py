"""Random views of images, each a pure function of its seed.

A model that sees the same view of an image in every epoch memorizes the image. Training therefore shows it random
crops, some of them mirrored.
"""

import hashlib
import json
import random
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
RAND_AUGMENT_MAGNITUDE = 9  # of 30, the value of the RandAugment paper (Cubuk et al. 2019) for ImageNet
# A letter before or behind makes another word of it (bright, leftover); a hyphen or an underscore does not.
SIDE = re.compile(r"(?<![^\W\d_])(?:left|right)(?:most|wards?|hand(?:ed)?)?(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True)
class ImageAugmentation:
    """How training images are varied; the defaults crop and mirror, and leave colors as captions name them.

    Attributes:
        crop_scale: smallest share of the image's area that a random crop keeps, over 0; at 1 there is no random
            crop, and the image is resized and cut as in inference.
        color_jitter: strength s from 0 to 1; brightness, contrast and saturation are each multiplied by a factor
            from 1 - s to 1 + s.
        rand_augment: RandAugment operations per image, at magnitude 9 of 30; 0 for none. They shear, shift and
            rotate, and change colors more than `color_jitter` does, up to turning bright ones into their negative.
        flip: mirror every other image: "safe" spares those with a caption that names left or right, "always" does
            not look at captions, "never" mirrors none.
        resolution: shorter edge of the view in pixels; None for that of inference. Somewhat less than in inference is
            faster, and since random crops show things larger than they appear later, often no worse (the FixRes
            effect, Touvron et al. 2019, https://arxiv.org/abs/1906.06423).

    Raises:
        ValueError: a value is out of range.
    """

    crop_scale: float = 0.35
    color_jitter: float = 0.0
    rand_augment: int = 0
    flip: str = "safe"
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be over 0 and at most 1, where images are not cropped at random."
            )
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter={self.color_jitter} must be from 0 (colors stay) to 1.")
        if not isinstance(self.rand_augment, int) or self.rand_augment < 0:
            raise ValueError(
                f"rand_augment={self.rand_augment} must be a whole number of operations, 0 for none; 2 is usual."
            )
        if self.flip not in FLIPS:
            raise ValueError(f"flip={self.flip!r} is unknown; use {', '.join(FLIPS)}.")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(
                f"resolution={self.resolution} must be at least 1 pixel; leave it out for the model's own."
            )


class ImageAugmenter:
    """Make the `pixel_values` of a random view of an image.

    The same arguments give the same pixels, whichever worker, rank or resumed run asks. Torch's random state is the
    same afterwards as before; during the call it is not, so threads must not call it at the same time.

    Args:
        image_processor: the stock image processor of the model's processor; resizes, crops and normalizes.
        augmentation: how to vary images.
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
        self.transforms: list[v2.Transform] = []  # of pixels from 0 to 255, in the size that the model sees
        if augmentation.rand_augment:
            # What a shift uncovers becomes the mean color: zero to the model, as nothing at all would be.
            fill = [round(mean / settings["rescale_factor"]) for mean in settings["image_mean"]]
            self.transforms.append(
                v2.RandAugment(augmentation.rand_augment, RAND_AUGMENT_MAGNITUDE, interpolation="bilinear", fill=fill)
            )
        if augmentation.color_jitter:
            self.transforms.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))

    def __call__(self, image: Image.Image, captions: Sequence[str], seed: int) -> Tensor:
        """Draw a view; see `draw`.

        Returns:
            (3, height, width) float32, normalized as in inference.
        """
        return normalize_pixels(self.image_processor, self.draw(image, captions, seed)[None])[0]

    def draw(self, image: Image.Image, captions: Sequence[str], seed: int) -> Tensor:
        """Draw a view, not yet normalized, in a quarter of the memory.

        Args:
            image: an image of mode "RGB", as `read_image` gives it.
            captions: all captions of the image, whichever it is trained with: a cached view meets each of them.
            seed: any whole number; another one draws another view.

        Returns:
            (3, height, width) bytes.
        """
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`, which seeds GPUs as well, whose state is not put back.
            torch.default_generator.manual_seed(_hash(seed))
            geometry: dict[str, Any] = {"size": self.size, "crop_size": self.crop_size}
            if self.crop is not None:
                # Only the draw is torchvision's, so that the processor resizes crops exactly as it resizes images.
                box = self.crop.make_params([image])
                left, top = box["left"], box["top"]
                image = image.crop((left, top, left + box["width"], top + box["height"]))
                geometry = {"do_resize": True, "size": self.crop_size, "do_center_crop": False}
            pixels = raw_pixels(self.image_processor, image, **geometry)
            for transform in self.transforms:
                pixels = transform(pixels)
            if self._may_flip(captions) and torch.rand(()) < 0.5:
                pixels = pixels.flip(-1)
        return pixels

    def describe(self) -> str:
        """Name all that the pixels depend on, besides the arguments of a call: part of the key of cached features.

        Returns:
            JSON with the settings, the image processor's settings and the versions of the libraries that do the work.
        """
        parts = {
            # `resolution` is in `crop_size`.
            "augmentation": {key: value for key, value in asdict(self.augmentation).items() if key != "resolution"},
            "transforms": [repr(transform) for transform in (self.crop, *self.transforms)],
            "processor": self.image_processor.to_dict(),
            "crop_size": self.crop_size,  # and so, in proportion, the size before the crop
            "versions": [
                f"{library.__name__} {library.__version__}" for library in (torch, torchvision, transformers)
            ],
        }
        return json.dumps(parts, sort_keys=True)

    def _may_flip(self, captions: Sequence[str]) -> bool:
        flip = self.augmentation.flip
        return flip == "always" or (flip == "safe" and not names_a_side(captions))


def raw_pixels(image_processor: Any, image: Image.Image, **geometry: Any) -> Tensor:
    """Resize and crop an image as a stock image processor does, and stop there.

    Args:
        image_processor: the stock image processor.
        image: an image of mode "RGB".
        **geometry: the processor's `size`, `crop_size`, ... where they are to be others.

    Returns:
        (3, height, width) bytes, on which the processor's own resizing ends as well.
    """
    return image_processor(image, return_tensors="pt", **geometry, do_rescale=False, do_normalize=False)[
        "pixel_values"
    ][0]


def normalize_pixels(image_processor: Any, pixels: Tensor) -> Tensor:
    """Do the rest of a stock image processor's work: (N, 3, height, width) bytes to normalized float32."""
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    return image_processor(pixels, return_tensors="pt", **options)["pixel_values"]


def names_a_side(captions: Sequence[str]) -> bool:
    """Tell whether a mirrored image might no longer fit its captions.

    English only, and on the safe side: "he left the room" and "the right answer" count too.

    Args:
        captions: the captions of an image.

    Returns:
        Whether one has the word left or right, in any case and also as in left-hand, right-handed or leftmost.
    """
    return any(SIDE.search(caption) for caption in captions)


def drop_words(caption: str, probability: float, seed: int) -> str:
    """Leave out words of a caption at random, so that no single word carries a match.

    Args:
        caption: words with blanks between them; a script without blanks is one word, and stays.
        probability: of each word to go, from 0 to 1.
        seed: another one leaves out other words.

    Returns:
        The words that stay, in order, with single blanks; at least one does. At probability 0 the caption as it is.

    Raises:
        ValueError: the probability is out of range.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"A probability of {probability} to drop a word is out of range; use 0 to 1, such as 0.1.")
    words = caption.split()
    if not (probability and words):
        return caption
    draw = random.Random(_hash(seed))
    kept = [word for word in words if draw.random() >= probability]
    return " ".join(kept or [draw.choice(words)])


def _scale(size: dict[str, int], resolution: int, shorter: int) -> dict[str, int]:
    return {edge: length * resolution // shorter for edge, length in size.items()}


def _hash(seed: int) -> int:
    """Make 32 bits of a seed: torch's CPU generator takes no more, and would ignore the others (an epoch, say)."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "big")
