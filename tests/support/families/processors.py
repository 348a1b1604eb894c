"""What a tiny model's repo needs to be asked with an image: a tokenizer of 512 words, and the files of its processor.

The tokens that stand for an image have the numbers that the model's config gives them; those that no config names have
numbers nobody uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.families.catalogue import VOCAB


@dataclass(frozen=True)
class Processor:
    """How a kind of model takes images.

    name    class of Transformers
    tokens  token → the key of config.json that holds its number, or a number
    prompt  the tokens that stand for an image before the processor has seen it
    images  of preprocessor_config.json
    values  of processor_config.json
    videos  of video_preprocessor_config.json; empty: there is none
    named   attribute of the tokenizer → token
    """

    name: str
    tokens: Mapping[str, str | int]
    prompt: tuple[str, ...]
    images: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    videos: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)


_QWEN_TOKENS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_QWEN_PROMPT = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_QWEN_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", **_PATCHES}
_QWEN_IMAGES |= {"size": {"shortest_edge": 64, "longest_edge": 1024}}
_SIDE = {"size": {"height": 16, "width": 16}}

PROCESSORS: Mapping[str, Processor] = {
    "qwen2_5": Processor(
        "Qwen2_5_VLProcessor",
        _QWEN_TOKENS,
        _QWEN_PROMPT,
        _QWEN_IMAGES,
        videos={**_QWEN_IMAGES, "video_processor_type": "Qwen2VLVideoProcessor"},
    ),
    "qwen3": Processor(
        "Qwen3VLProcessor",
        _QWEN_TOKENS,
        _QWEN_PROMPT,
        _QWEN_IMAGES,
        videos={**_QWEN_IMAGES, "video_processor_type": "Qwen3VLVideoProcessor"},
    ),
    "gemma3": Processor(
        "Gemma3Processor",
        {
            "<start_of_image>": "boi_token_index",
            "<end_of_image>": "eoi_token_index",
            "<image_soft_token>": "image_token_index",
            **{"\n" * count: 500 + count for count in (1, 2, 3, 4)},
        },
        ("<start_of_image>",),
        {"image_processor_type": "Gemma3ImageProcessor", **_SIDE},
        values={"image_seq_length": 4},
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "gemma4": Processor(
        "Gemma4Processor",
        {
            "<|image>": "boi_token_id",
            "<image|>": "eoi_token_id",
            "<|image|>": "image_token_id",
            "<|video|>": 500,
            "<|audio>": 501,
            "<audio|>": 502,
            "<|audio|>": 503,
        },
        ("<|image|>",),
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "patch_size": 4,
            "max_soft_tokens": 70,
        },
        videos={"video_processor_type": "Gemma4VideoProcessor", "patch_size": 4, "max_soft_tokens": 70},
        named={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
    ),
    "lfm2": Processor(
        "Lfm2VlProcessor",
        {"<image>": "image_token_id", "<|image_start|>": 500, "<|image_end|>": 501, "<|img_thumbnail|>": 502},
        ("<image>",),
        {
            "image_processor_type": "Lfm2VlImageProcessor",
            "encoder_patch_size": 4,
            "min_tiles": 1,
            "max_tiles": 1,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "tile_size": 16,
            "do_image_splitting": False,
            **_SIDE,
        },
        named={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
    ),
    "pixtral": Processor(
        "PixtralProcessor",
        {"[IMG]": "image_token_index", "[IMG_BREAK]": 500, "[IMG_END]": 501},
        ("[IMG]",),
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 4, "size": {"longest_edge": 16}},
        values={"patch_size": 4, "spatial_merge_size": 2},
    ),
    "llama4": Processor(
        "Llama4Processor",
        {
            "<|image_start|>": "boi_token_index",
            "<|image_end|>": "eoi_token_index",
            "<|patch|>": "image_token_index",
            "<|image|>": 500,
            "<|tile_x_separator|>": 501,
            "<|tile_y_separator|>": 502,
        },
        ("<|image|>",),
        {"image_processor_type": "Llama4ImageProcessor", "max_patches": 1, "resize_to_max_canvas": False, **_SIDE},
        values={"patch_size": 4, "pixel_shuffle_ratio": 0.5},
    ),
}


def write_processor(folder: Path, kind: str) -> None:
    """The files, beside a model's config.json."""
    processor = PROCESSORS[kind]
    numbers = _numbers(folder, processor)
    words = {f"t{number}": number for number in range(VOCAB)}
    for token, number in numbers.items():
        del words[f"t{number}"]
        words[token] = number
    added = [
        {"id": number, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, number in sorted(numbers.items(), key=lambda one: one[1])
    ]
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t3"}
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    files: dict[str, Mapping[str, Any]] = {
        "tokenizer.json": whole,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t3", "bos_token": "t1"}
        | {"eos_token": "t2", "pad_token": "t0", "extra_special_tokens": dict(processor.named)}
        | {"processor_class": processor.name},
        "preprocessor_config.json": {**processor.images, "processor_class": processor.name},
        "processor_config.json": {**processor.values, "processor_class": processor.name},
    }
    if processor.videos:
        files["video_preprocessor_config.json"] = {**processor.videos, "processor_class": processor.name}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def prompt_with_image(folder: Path, kind: str) -> list[int]:
    """A prompt of words around one image, for the model of a folder."""
    processor = PROCESSORS[kind]
    numbers = _numbers(folder, processor)
    return [1, 17, 33, 250, *(numbers[token] for token in processor.prompt), 99, 4, 311, 8]


def _numbers(folder: Path, processor: Processor) -> dict[str, int]:
    config = json.loads((folder / "config.json").read_text())
    return {token: config[key] if isinstance(key, str) else key for token, key in processor.tokens.items()}
