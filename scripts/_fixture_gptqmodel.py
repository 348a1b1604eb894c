"""Fixtures of GPTQModel."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _fixture_sources import SEED, frequency


def _rtn(**options: Any) -> Any:
    """Round to nearest: needs no data."""
    from gptqmodel.quantization.config import RTNConfig

    settings = {"bits": 4, "group_size": 32, "sym": True, "format": "gptq", "offload_to_disk": False}
    return RTNConfig(**(settings | options))


def _gptq(**options: Any) -> Any:
    """GPTQ proper: calibrated."""
    from gptqmodel import QuantizeConfig

    settings = {"bits": 4, "group_size": 32, "sym": True, "offload_to_disk": False}
    return QuantizeConfig(**(settings | options))


GPTQMODEL: dict[str, tuple[str, Callable[[], Any]]] = {
    "gptqmodel-qwen3-w4g32": ("qwen3", lambda: _rtn()),
    "gptqmodel-qwen3-w4g32-asym-v1": ("qwen3-positive", lambda: _rtn(sym=False)),
    "gptqmodel-qwen3-w4g32-asym-v2": ("qwen3-positive", lambda: _rtn(sym=False, format="gptq_v2")),
    "gptqmodel-qwen3-w4g32-v2": ("qwen3", lambda: _rtn(format="gptq_v2")),
    "gptqmodel-qwen3-w4g32-actorder": (
        "qwen3",
        lambda: _gptq(desc_act=True, act_group_aware=False, static_groups=False),
    ),
    "gptqmodel-qwen3-w4g32-actorder-static": (
        "qwen3",
        lambda: _gptq(desc_act=True, act_group_aware=False, static_groups=True),
    ),
    "gptqmodel-qwen3-w4-channel": ("qwen3", lambda: _rtn(group_size=-1)),
    "gptqmodel-qwen3-w4g64-ragged": ("qwen3-ragged", lambda: _rtn(group_size=64)),
    "gptqmodel-qwen3-w3g32-asym": ("qwen3-positive", lambda: _rtn(bits=3, sym=False)),
    "gptqmodel-qwen3-w3g32-planar": (
        "qwen3-positive",
        lambda: _rtn(bits=3, sym=False, format="gptq_p"),
    ),
    "gptqmodel-qwen3-w2g32": ("qwen3", lambda: _rtn(bits=2)),
    "gptqmodel-qwen3-w2g32-asym": ("qwen3-positive", lambda: _rtn(bits=2, sym=False)),
    # o_proj matches both rules and stays bf16: GPTQModel tries exclusions first, config.json sorts them last.
    "gptqmodel-qwen3-w4g32-dynamic": (
        "qwen3-untied",
        lambda: _rtn(lm_head=True, dynamic={r"-:.*\.o_proj": {}, r"+:.*[ko]_proj": {"group_size": 64}}),
    ),
    "gptqmodel-llama-bias-w4g32": ("llama-bias", lambda: _rtn()),
    "gptqmodel-qwen3moe-w4g32": ("qwen3moe", lambda: _rtn()),
    "gptqmodel-qwen3moe-w3g32-asym": ("qwen3moe", lambda: _rtn(bits=3, sym=False)),
    "gptqmodel-mixtral-w4g32": ("mixtral", lambda: _rtn()),
}


def gptqmodel(source: Path, out: Path, name: str) -> None:
    """One GPTQModel fixture."""
    # Its thread pools want more cores than a small machine has.
    os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import RTNConfig

    config = GPTQMODEL[name][1]()
    model = GPTQModel.load(str(source), config, device="cpu")
    if isinstance(config, RTNConfig):
        model.quantize(None)
    else:
        torch.manual_seed(SEED)
        texts = [torch.multinomial(frequency(), 64, replacement=True) for _ in range(32)]
        model.quantize(
            [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in texts],
            batch_size=1,
        )
    model.save(str(out))
