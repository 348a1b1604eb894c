"""What a family's tiny model is asked in Transformers: twelve tokens, four of them an image where it takes one.

The image is made of what the model's `forward` takes, as its processor would hand it over, so that none is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Asked = dict[str, torch.Tensor]
_WORDS = (1, 17, 33, 250, 99, 4, 311, 8, 5, 5, 400, 12)
_IMAGE = slice(4, 8)
"""Tokens that stand for the image, where there is one."""
_PATCHES = 4
"""Patches along a side of an image, two by two of which become a token."""


def asked(config: Any, image: str, seed: int = 3) -> Asked:
    """Arguments of `forward`. `image`: a key of `IMAGES`, or empty; `seed`: of its pixels."""
    ids = list(_WORDS)
    if not image:
        return {"input_ids": torch.tensor([ids])}
    token = getattr(config, "image_token_id", None) or config.image_token_index
    ids[_IMAGE] = [token] * 4
    found = {"input_ids": torch.tensor([ids])}
    types = torch.tensor([[int(n == token) for n in ids]])
    return found | IMAGES[image](config.vision_config, types, torch.Generator().manual_seed(seed))


def _pixels(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """The whole image, 16 by 16 pixels."""
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=pixels)}


def _flat(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Gemma 3: it is told which tokens are an image's, which see each other."""
    return {**_pixels(vision, types, pixels), "token_type_ids": types}


def _sizes(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Pixtral's tower: images of any size."""
    return {**_pixels(vision, types, pixels), "image_sizes": torch.tensor([[16, 16]])}


def _downsampled(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Step 3.7: two convolutions make one token of four by four patches, so that four are of 32 by 32 pixels."""
    side = 8 * vision.patch_size
    return {"pixel_values": torch.randn(1, 3, side, side, generator=pixels)}


def _grid(values: torch.Tensor) -> Asked:
    """Patches of one image, row by row."""
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, _PATCHES, _PATCHES]])}


def _qwen(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Qwen, and GLM-4.5V: a patch is the same in two frames; positions are counted by kinds of tokens."""
    values = torch.randn(_PATCHES**2, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=pixels)
    return {**_grid(values), "mm_token_type_ids": types}


def _muse(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Muse Spark: a patch is the same in two frames."""
    return _grid(torch.randn(_PATCHES**2, 3 * vision.patch_temporal * vision.patch_size**2, generator=pixels))


def _kimi(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Kimi-K2.5: patches as small images."""
    return _grid(torch.randn(_PATCHES**2, 3, vision.patch_size, vision.patch_size, generator=pixels))


def _siglip2(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """LFM2-VL: patches of images of any shape, up to a number that is the same for all of them."""
    return {
        "pixel_values": torch.randn(1, _PATCHES**2, 3 * vision.patch_size**2, generator=pixels),
        "spatial_shapes": torch.tensor([[_PATCHES, _PATCHES]]),
        "pixel_attention_mask": torch.ones(1, _PATCHES**2, dtype=torch.long),
    }


def _gemma4(vision: Any, types: torch.Tensor, pixels: torch.Generator) -> Asked:
    """Gemma 4: patches, each with its place, a square of which is pooled into a token."""
    side = 2 * vision.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    return {
        "pixel_values": torch.rand(1, side**2, 3 * vision.patch_size**2, generator=pixels),
        "image_position_ids": places.unsqueeze(0),
        "mm_token_type_ids": types,
    }


IMAGES: Mapping[str, Callable[[Any, torch.Tensor, torch.Generator], Asked]] = {
    "pixels": _pixels,
    "flat": _flat,
    "sizes": _sizes,
    "downsampled": _downsampled,
    "qwen": _qwen,
    "muse": _muse,
    "kimi": _kimi,
    "siglip2": _siglip2,
    "gemma4": _gemma4,
}
"""How a kind of model takes an image: from the configuration of its vision tower, which tokens are the image's
(`[1, 12]`), and where pixels come from."""
