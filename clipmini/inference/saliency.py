"""Show where a model looked: compare each place of the vision tower's last map with a caption, and draw it."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from modeling_clipmini import ClipMiniModel
from modeling_clipmini.modeling_clipmini import join_levels, normalize

from .embed import DualEncoder

COLORS = colormaps["inferno"]  # even steps of lightness, also in print and for people who do not tell red from green
OPACITY = 0.55
SHADE = 0.35  # of the image's light, where the processor cuts the image off


@torch.no_grad()
def compare_places(encoder: DualEncoder, image: Image.Image, vector: Tensor) -> Tensor:
    """Compare each place of the vision tower's last map with a vector, as if the tower had seen nothing else.

    Each place is pooled, projected and normalized on its own. Of a vision transformer, the places are the patch tokens
    of the last layer, which also hold what attention has brought from elsewhere.

    Args:
        encoder: a clipmini model.
        image: of mode "RGB".
        vector: (D,) of length 1: the embedding of a caption, or of another image.

    Returns:
        (height, width) cosine similarities in [-1, 1], on the CPU, the top left place first.

    Raises:
        ValueError: the model shows no places: it is computed by graphs, or its tower returns no map.
    """
    model = encoder.model
    if not isinstance(model, ClipMiniModel):
        raise ValueError(f"Where {encoder.name} looked cannot be shown: it is no clipmini model in torch.")
    towers, levels = model.vision_towers(), model.config.vision_levels or None
    pixel_values = encoder.prepare_image(image).to(model.device, model.dtype)
    size: Any = None  # of the first tower's map
    joined = []
    for tower in towers:
        outputs = tower(pixel_values=pixel_values, output_hidden_states=levels, do_pooling=False)
        places, *own_size = _split_places(tower.timm_model, outputs.last_hidden_state)
        size = size or own_size
        pooled = tower.timm_model.forward_head(places).flatten(1)  # one row for each place
        maps = [pooled.T.unflatten(1, own_size), *(level_map[0] for level_map in outputs.hidden_states or ())]
        parts = [F.adaptive_avg_pool2d(feature_map, size).flatten(1).T for feature_map in maps]
        joined.append(join_levels(parts) if levels or towers[1:] else parts[0])
    pooled = torch.cat(joined, dim=1)  # (height * width, V)
    embeds = normalize(model.get_image_features(pooled_image=pooled).pooler_output)  # (height * width, D)
    return (embeds.cpu() @ vector).view(size)


def _split_places(timm_model: Any, hidden: Any) -> tuple[Tensor, int, int]:
    """Return each place of one image's map as a map of its own, as timm's head takes it, and the map's size."""
    num_channels = timm_model.num_features
    shape = hidden.shape[1:] if isinstance(hidden, Tensor) else ()  # some towers return a list
    if len(shape) == 3 and shape[0] == num_channels:  # (channels, height, width)
        return hidden[0].flatten(1).T[:, :, None, None], shape[1], shape[2]
    if len(shape) == 3 and shape[2] == num_channels:  # (height, width, channels)
        return hidden.reshape(-1, 1, 1, num_channels), shape[0], shape[1]
    if len(shape) == 2:  # (tokens, channels)
        num_prefix = getattr(timm_model, "num_prefix_tokens", 0)
        tokens = hidden[0, num_prefix:]
        edge = math.isqrt(len(tokens))
        height, width = getattr(getattr(timm_model, "patch_embed", None), "grid_size", (edge, edge))
        if height * width == len(tokens) > 0:
            # Repeated in place of the prefix tokens: some heads take the first token, others all but the prefix.
            return tokens[:, None].expand(-1, num_prefix + 1, -1), height, width
    name = type(timm_model).__name__
    raise ValueError(f"Where the model looked cannot be shown: its vision tower, a {name}, returns no map.")


def find_crop(processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Return which part of an image a stock image processor shows the model.

    Args:
        processor: resizes to `size` and cuts `crop_size` out of the center, as `image_processor_for` makes it.
        width: of the image, in pixels.
        height: likewise.

    Returns:
        Left, top, right and bottom, in pixels of the image.
    """
    if edge := processor.size.get("shortest_edge"):
        scale_x = scale_y = edge / min(width, height)
    else:
        scale_x, scale_y = processor.size["width"] / width, processor.size["height"] / height
    half_width, half_height = processor.crop_size["width"] / scale_x / 2, processor.crop_size["height"] / scale_y / 2
    return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height


def draw_places(image: Image.Image, similarities: Tensor, crop: tuple[float, float, float, float]) -> Image.Image:
    """Draw similarities over an image, the highest of them bright and the lowest dark, whatever their range.

    Args:
        image: of mode "RGB".
        similarities: (height, width), as from `compare_places`.
        crop: the part of the image that they cover, as from `find_crop`.

    Returns:
        An image of the same size; what the model did not see is in the shade.
    """
    left, top, right, bottom = map(round, crop)
    low, high = similarities.min(), similarities.max()
    stretched = ((similarities - low) / (high - low).clamp(min=1e-6)).numpy()
    smooth = Image.fromarray(stretched).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    colored = Image.fromarray(COLORS(np.asarray(smooth).clip(0, 1), bytes=True)[..., :3])
    drawn = Image.eval(image, lambda value: int(value * SHADE))
    box = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    seen = colored.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
    drawn.paste(Image.blend(image.crop(box), seen, OPACITY), box[:2])
    return drawn
