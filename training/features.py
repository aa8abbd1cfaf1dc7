"""What frozen parts of the towers make of a data set, computed once and kept on disk.

A frozen tower in eval mode gives the same output for the same picture or caption in every epoch. Computing it once
turns an hour of training into minutes. The rest then trains on exactly the vectors it would have seen; augmentation
becomes a fixed number of views of each picture.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PretrainedConfig

from clipmini.data.augment import ImageAugmenter
from clipmini.data.pairs import CachedPairs
from clipmini.files import cache_root
from clipmini.inference.encode import run_texts
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import eval_mode
from modeling_clipmini.images_clipmini import read_named

from .arguments import ClipMiniTrainingArguments
from .feature_cache import cached_array, hash_rows, hash_weights
from .sampling import draw_seed
from .tower_split import FrozenFront, num_stages

logger = logging.getLogger(__name__)

# Rows that a killed run may have to compute again, and steps of the progress bar: two or three seconds each.
IMAGE_CHUNK, CAPTION_CHUNK = 256, 1024
OF_NO_EFFECT = ("_name_or_path", "architectures", "dtype", "transformers_version")


class TowerFeatures:
    """Decides what of a model can be computed once, under some training arguments, and has it computed.

    Args:
        model: with frozen what is to be frozen.
        processor: the model's processor.
        args: `freeze_vision`, `freeze_text`, `vision_stages`, `augment`, `cache_features`, ...

    Attributes:
        augmenter: makes the training views of a picture; None where there is no augmentation.
        front: the vision tower's frozen first stages, where only the last ones train and the architecture permits it.
    """

    def __init__(self, model: ClipMiniModel, processor: ClipMiniProcessor, args: ClipMiniTrainingArguments) -> None:
        self.model, self.processor, self.args = model, processor, args
        self.augmenter = self.front = None
        augmentation = args.image_augmentation
        if augmentation is not None:
            resolution = (args.augment or {}).get("resolution")
            self.augmenter = ImageAugmenter(processor.image_processor, augmentation, resolution)
        if args.cache_features and args.vision_stages is not None:
            timm_model = model.vision_model.timm_model
            if args.vision_stages < num_stages(timm_model):
                size = processor.image_processor.crop_size
                example = torch.rand(2, 3, size["height"], size["width"], device=model.device)
                self.front = FrozenFront.find(timm_model, args.vision_stages, example)
                levels = model.config.vision_levels  # `find` has tried all else
                if self.front is not None and levels and not self._resumes(self.front, example):
                    logger.warning(
                        "vision_levels=%s needs feature maps from before the first trained stage, which are not kept: "
                        "the whole vision tower has to run at every step",
                        levels,
                    )
                    self.front = None
        if args.num_views > 1 and not (args.cache_features and (args.freeze_vision or self.front is not None)):
            logger.warning("num_views=%d has no effect: no part of the vision tower is cached", args.num_views)

    @torch.no_grad()
    def _resumes(self, front: FrozenFront, example: Tensor) -> bool:
        """Tell whether activations give the pooled features that pictures give, `vision_levels` included."""
        with eval_mode(self.model):
            whole = self.model.pool_images(example)
            activation = front.front(example)
            with front.resuming():
                resumed = self.model.pool_images(activation)
        return resumed.shape == whole.shape and torch.allclose(resumed, whole, rtol=1e-5, atol=1e-5)

    def for_training(self, pairs: Dataset) -> CachedPairs:
        """Give the pairs with features of the training views where the towers, or their first stages, are frozen."""
        return self._cached(pairs, self.augmenter, self.args.num_views)

    def for_evaluation(self, pairs: Dataset | CachedPairs) -> CachedPairs:
        """Give the pairs with features of the pictures as they are, where towers or their first stages are frozen."""
        return pairs if isinstance(pairs, CachedPairs) else self._cached(pairs, None, 1)

    def _cached(self, pairs: Dataset, augment: ImageAugmenter | None, num_views: int) -> CachedPairs:
        args = self.args
        images = texts = None
        cache_dir = None if args.feature_cache_dir is None else Path(args.feature_cache_dir)
        with eval_mode(self.model):
            if args.cache_features and (args.freeze_vision or self.front is not None):
                images = cache_image_features(
                    self.model,
                    self.processor,
                    pairs,
                    front=self.front,
                    augment=augment,
                    num_views=num_views,
                    batch_size=args.per_device_eval_batch_size,
                    num_workers=args.dataloader_num_workers,
                    cache_dir=cache_dir,
                )
            if args.cache_features and args.freeze_text:
                texts = cache_text_features(
                    self.model,
                    self.processor,
                    pairs,
                    batch_size=8 * args.per_device_eval_batch_size,
                    cache_dir=cache_dir,
                )
        return CachedPairs(pairs, images, texts, front=None if images is None else self.front)


class _Views(torch.utils.data.Dataset):
    """The pixels of K views of each picture: (K, 3, height, width)."""

    def __init__(
        self, pairs: Dataset, processor: ClipMiniProcessor, augment: ImageAugmenter | None, num_views: int
    ) -> None:
        self.pairs, self.processor, self.augment, self.num_views = pairs, processor, augment, num_views

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Tensor:
        content = self.pairs[row]
        picture = read_named(content["image"], f"image_id {content['image_id']}")
        if self.augment is None:
            return self.processor(images=[picture])["pixel_values"]
        views = (self.augment(picture, content["captions"], draw_seed(row, view)) for view in range(self.num_views))
        return torch.stack(list(views))


def cache_image_features(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset,
    *,
    front: FrozenFront | None = None,
    augment: ImageAugmenter | None = None,
    num_views: int = 1,
    batch_size: int = 16,
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Run the vision tower, or its first stages, once over the pictures of a data set.

    Args:
        model: its vision tower in eval mode, as frozen towers are.
        processor: the model's processor.
        pairs: the data set, one row per image.
        front: run these stages alone; None for the whole tower.
        augment: makes the views; None for one view, the processor's own.
        num_views: K.
        batch_size: pictures per forward.
        num_workers: processes that read pictures.
        cache_dir: root of the cache on disk; by default `CLIPMINI_CACHE`, else `~/.cache/clipmini`.

    Returns:
        (I, K, V) float32, or with `front` (I, K, ...) float16, memory-mapped; computed now or by an earlier run with
        the same pictures, weights and views.
    """
    num_views = 1 if augment is None else num_views
    views = _Views(pairs, processor, augment, num_views)
    tower = model.vision_model if front is None else nn.ModuleList(front.modules.values())
    run: Callable[[Tensor], Tensor] = model.pool_images if front is None else front.front
    what = f"pooled outputs, levels {model.config.vision_levels}"
    key = {
        "what": what if front is None else f"activations entering {front.entry}",
        "data": hash_rows(pairs, ("image", "captions") if augment is not None else ("image",)),
        # The weights alone tell neither strides nor pooling.
        "weights": f"{_describe(model.config.vision_config)} {hash_weights(tower)}",
        "pixels": augment.describe() if augment is not None else str(processor.image_processor),
    }
    with torch.no_grad():
        example = run(views[0][:1].to(model.device))

    @torch.no_grad()
    def compute(start: int, stop: int) -> np.ndarray:
        rows = torch.utils.data.Subset(views, range(start, stop))
        loader = DataLoader(rows, batch_size=max(1, batch_size // num_views), num_workers=num_workers)
        results = []
        for batch in loader:
            # Convolutions run a quarter to a half faster so, on the CPU and under autocast on a GPU.
            pixels = batch.flatten(0, 1).to(model.device).contiguous(memory_format=torch.channels_last)
            results.append(run(pixels).float().cpu().unflatten(0, batch.shape[:2]))
        return torch.cat(results).numpy().astype(dtype)

    dtype = np.float32 if front is None else np.float16
    shape = (len(pairs), num_views, *example.shape[1:])
    return cached_array(cache_root(cache_dir) / "features", key, shape, dtype, compute, IMAGE_CHUNK, "pictures")


def cache_text_features(
    model: ClipMiniModel,
    processor: ClipMiniProcessor,
    pairs: Dataset,
    *,
    batch_size: int = 128,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Run the text tower once over all captions of a data set.

    Args:
        model: its text tower in eval mode, as frozen towers are.
        processor: the model's processor.
        pairs: the data set, one row per image.
        batch_size: captions per forward.
        cache_dir: root of the cache on disk; by default `CLIPMINI_CACHE`, else `~/.cache/clipmini`.

    Returns:
        (T, W) float32, memory-mapped, image by image.
    """
    captions = CachedPairs(pairs).captions
    key = {
        "what": f"{model.config.text_pooling}-pooled outputs",
        "tokens": _hash_tokens(processor, captions),
        "weights": f"{_describe(model.config.text_config)} {hash_weights(model.text_model)}",
    }

    def compute(start: int, stop: int) -> np.ndarray:
        def embed(inputs: BatchEncoding) -> Tensor:
            return model.pool_texts(**inputs.to(model.device))

        return run_texts(processor, captions[start:stop], embed, batch_size, show_progress=False).numpy()

    shape = (len(captions), model.config.text_config.hidden_size)
    return cached_array(cache_root(cache_dir) / "features", key, shape, np.float32, compute, CAPTION_CHUNK, "captions")


def _describe(config: PretrainedConfig) -> str:
    """Give a tower's config without what changes no output, such as where and by which version it was saved."""
    values = {name: value for name, value in config.to_dict().items() if name not in OF_NO_EFFECT}
    return json.dumps(values, sort_keys=True, default=str)


def _hash_tokens(processor: ClipMiniProcessor, captions: list[str]) -> str:
    """Hash what the text tower sees, which covers captions and tokenizer at once."""
    digest = hashlib.sha256()
    for ids in processor.tokenizer(captions, truncation=True)["input_ids"]:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
