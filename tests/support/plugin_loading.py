"""Loads a model through vLLM's own loader into this process: no engine, no KV cache, seconds instead of many."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def load(model: Path, dtype: str = "bfloat16", before: Callable[[], object] = lambda: None) -> Any:
    """The model as vLLM serves it, parameters loaded and processed; `before` is called when loading starts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's CPU worker does: the loader empties an accelerator's cache

    config = EngineArgs(
        model=str(model), dtype=dtype, max_model_len=256, enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()
    with set_current_vllm_config(config):
        if torch.distributed.is_initialized():
            cleanup_dist_env_and_memory()  # the expert group exists for models with experts only
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        loader = get_model_loader(config.load_config)
        before()
        return loader.load_model(vllm_config=config, model_config=config.model_config)
