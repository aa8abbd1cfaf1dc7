"""Outputs of frozen parts of the towers, computed once for a data set and kept in the store.

In eval mode, a frozen tower has the same output for an image or a caption in every epoch. Computing it once turns an
hour of training into minutes, and the rest of the model trains on exactly the vectors it would have seen. Augmentation
becomes a fixed number of views of each image.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig

from clipmini.data.augment import ImageAugmenter, describe_processor
from clipmini.data.pairs import PairDataset
from clipmini.data.scan import check_pixels, read_columns, scan_readable
from clipmini.inference.embed import describe_libraries, hash_weights
from clipmini.store import KEY_BYTES, StoredRows, as_keys, digest, stored_rows
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.encoding_clipmini import by_length, channels_last, embed_in_batches, eval_mode
from modeling_clipmini.images_clipmini import read_named

from .arguments import ClipMiniTrainingArguments
from .batches import draw_seed
from .stages import FrozenStages, stage_parts

logger = logging.getLogger(__name__)

# Rows that a killed run may have to compute again, and steps of the progress bar: two or three seconds each. With data
# workers, which start anew for every chunk, it is so many images for each.
IMAGE_CHUNK, CAPTION_CHUNK = 256, 1024
IGNORED_CONFIG_KEYS = ("_name_or_path", "architectures", "dtype", "transformers_version")


def prepare_features(
    model: ClipMiniModel, splits: Mapping[str, Dataset], args: ClipMiniTrainingArguments
) -> dict[str, PairDataset]:
    """Compute what frozen parts of the towers make of each image and caption, or find it in the store.

    Args:
        model: the model that will be trained, with its processor. It is moved to `args.device`, as Trainer does.
        splits: pairs, as `load_pairs` returns them. Of "train" the training views are prepared, of the others the
            images as they are.
        args: `freeze_vision`, `freeze_text`, `vision_stages`, `augment`, `num_views`, `cache_features`, ...

    Returns:
        The same pairs, with features wherever a tower or its first stages are frozen. `ClipMiniTrainer` takes them in
        place of the data sets; without features it trains the same model, and runs the frozen parts at every step.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the store cannot be written, or the disk has too little room.
    """
    nn.Module.to(model, args.device)
    stages = _find_frozen_stages(model, args) if args.cache_features else None
    caches_images = args.cache_features and (args.freeze_vision or stages is not None)
    if args.num_views > 1 and not caches_images:
        logger.warning("num_views=%d has no effect: no part of the vision tower is cached", args.num_views)
    if caches_images and args.augment is not None and args.num_views == 1:
        logger.warning("augment makes one view of each image, the same in every epoch: raise num_views")
    if args.cache_features and args.freeze_text and args.length_groups > 1:
        logger.warning("length_groups has no effect: the outputs of the frozen text tower are cached")
    prepared = {}
    with eval_mode(model):
        for name, rows in splits.items():
            images = _image_features(model, rows, args, stages, is_train=name == "train") if caches_images else None
            texts = _text_features(model, rows, args) if args.cache_features and args.freeze_text else None
            prepared[name] = PairDataset(rows, images, texts, stages)
    return prepared


@torch.no_grad()
def _find_frozen_stages(model: ClipMiniModel, args: ClipMiniTrainingArguments) -> FrozenStages | None:
    """Find the frozen first stages of the vision tower, if only its last ones train and it can be split."""
    timm_model, levels = model.vision_model.timm_model, model.config.vision_levels
    if args.vision_stages is None or args.vision_stages >= len(stage_parts(timm_model)):
        return None
    size = model.processor.image_processor.crop_size
    example = torch.rand(2, 3, size["height"], size["width"], generator=torch.Generator().manual_seed(0))
    example = example.to(model.device)
    stages = FrozenStages.find(timm_model, args.vision_stages, example)
    if stages is None or not levels:
        return stages
    # `find` has compared the output of the timm model, but not the feature maps that `vision_levels` pools.
    with eval_mode(model):
        whole = model.pool_images(example)
        resumed = stages.resume(model, stages.run_beside(model, example))
    if resumed.shape == whole.shape and torch.allclose(resumed, whole, rtol=1e-5, atol=1e-5):
        return stages
    logger.warning(
        "vision_levels=%s needs feature maps from before the first trained stage, which are not kept: "
        "the whole vision tower has to run at every step",
        levels,
    )
    return None


def _image_features(
    model: ClipMiniModel,
    rows: Dataset,
    args: ClipMiniTrainingArguments,
    stages: FrozenStages | None,
    *,
    is_train: bool,
) -> StoredRows:
    """Run the vision tower, or its frozen stages, over K views of each image.

    Returns:
        (I, K, V) float32 pooled outputs, or (I, K, ...) activations: float16 for training, float32 to measure with.
    """
    processor, augmentation = model.processor, args.image_augmentation if is_train else None
    augment = None if augmentation is None else ImageAugmenter(processor.image_processor, augmentation)
    num_views = args.num_views if is_train else 1
    run: Callable[[Tensor], Tensor] = model.pool_images
    tower: nn.Module = model.vision_model
    side_config = model.config.side_vision_config
    kind = f"pooled outputs, levels {model.config.vision_levels}"
    if stages is not None:
        run = functools.partial(stages.run_beside, model)
        tower = nn.ModuleList([*stages.modules.values(), *model.vision_towers()[1:]])
        kind = f"activations entering {stages.entry}" + ("" if side_config is None else f", side tower: {kind}")
    # The weights alone say nothing about strides and pooling.
    configs = " ".join(_describe(config) for config in (model.config.vision_config, side_config) if config is not None)
    space = {
        "kind": kind,
        "weights": f"{configs} {hash_weights(tower)}",
        "pixels": describe_processor(processor.image_processor) if augment is None else augment.describe(),
        "libraries": describe_libraries(),
    }
    images = scan_readable(rows).pixels  # (I, 16)
    keys = images[:, None]
    if augment is not None:
        keys = np.empty((len(rows), num_views, KEY_BYTES), dtype=np.uint8)
        for row, captions in enumerate(read_columns(rows, "captions")["captions"].to_pylist()):
            keys[row] = _view_keys(augment, images[row], captions, num_views)

    def embed(batch: list[Tensor]) -> Tensor:
        return run(channels_last(torch.stack(batch).to(model.device)))

    def compute(indices: list[int]) -> np.ndarray:
        wanted: dict[int, list[int]] = {}
        for index in indices:
            wanted.setdefault(index // num_views, []).append(index % num_views)
        items: Any = list(wanted.items())
        prepare = functools.partial(_prepare_views, rows, processor, augment, images)
        loader = DataLoader(
            items,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            collate_fn=prepare,
            generator=torch.Generator(),  # else what training draws would depend on what the store had
        )
        pixels = itertools.chain.from_iterable(loader)
        return embed_in_batches(pixels, embed, args.per_device_eval_batch_size).numpy()

    return stored_rows(
        space,
        keys,
        compute,
        dtype=np.float16 if stages is not None and is_train else np.float32,
        # Activations are large, and the workers' chunk is in memory several times.
        chunk_rows=IMAGE_CHUNK * max(1, args.dataloader_num_workers if stages is None else 1),
        description="images",
    )


def _text_features(model: ClipMiniModel, rows: Dataset, args: ClipMiniTrainingArguments) -> StoredRows:
    """Run the text tower over all captions, image by image: (T, W) float32."""
    captions = PairDataset(rows).captions
    # The tokens that the tower sees cover caption and tokenizer at once. Those of all captions would fill the memory.
    starts = range(0, len(captions), CAPTION_CHUNK)
    tokenize = functools.partial(model.processor.tokenizer, truncation=True, return_attention_mask=False)
    parts = (tokenize(captions[start : start + CAPTION_CHUNK]) for start in starts)
    keys = as_keys(digest(np.array(ids, np.int64).tobytes()) for tokens in parts for ids in tokens["input_ids"])
    space = {
        "kind": f"{model.config.text_pooling}-pooled outputs, padded with {model.config.text_padding_id}",
        "weights": f"{_describe(model.config.text_config)} {hash_weights(model.text_model)}",
        "libraries": describe_libraries(),
    }

    def embed(batch: list[str]) -> Tensor:
        return model.pool_texts(**model.processor(text=batch).to(model.device))

    def compute(indices: list[int]) -> np.ndarray:
        batch_size = 8 * args.per_device_eval_batch_size
        return embed_in_batches([captions[index] for index in indices], embed, batch_size, by_length).numpy()

    return stored_rows(
        space,
        keys,
        compute,
        dtype=np.float32,
        chunk_rows=CAPTION_CHUNK,
        description="captions",
    )


def _view_keys(augment: ImageAugmenter, image: np.ndarray, captions: Sequence[str], num_views: int) -> np.ndarray:
    """Return the keys of an image's views, (K, 16); captions matter only where they forbid to mirror the image."""
    flips = str(augment.may_flip(captions))
    return as_keys(digest(image.tobytes(), flips, str(view)) for view in range(num_views))


def _prepare_views(
    rows: Dataset,
    processor: ClipMiniProcessor,
    augment: ImageAugmenter | None,
    images: np.ndarray,
    wanted: tuple[int, list[int]],
) -> list[Tensor]:
    """Return the wanted views of the image in a row, as the vision tower takes them: each (3, height, width)."""
    row, views = wanted
    content = rows[row]
    image = read_named(content["image"], f"image_id {content['image_id']}")
    check_pixels(image, images[row], f"image_id {content['image_id']}")
    if augment is None:
        return list(processor(images=[image])["pixel_values"])
    # The digest of the image, not its row, since rows move when others are added.
    seed = int.from_bytes(images[row].tobytes(), "big")
    return [augment(image, content["captions"], draw_seed(seed, view)) for view in views]


def _describe(config: PretrainedConfig) -> str:
    """Return a tower's config without keys that change no output, such as the version that saved it."""
    values = {name: value for name, value in config.to_dict().items() if name not in IGNORED_CONFIG_KEYS}
    return json.dumps(values, sort_keys=True, default=str)
