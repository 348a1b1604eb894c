"""The vLLM plugin: xpuquant installed beside vLLM, then `vllm serve OUT`.

vLLM calls `register` in every process (entry point group `vllm.general_plugins`). A repo whose
`quantization_config` says `quant_method: xpuquant` is then served by the classes of this package:
`config` chooses, `linear` and `experts` hold parameters in the stored layout and compute, `loading` brings
the tensors in and refuses incomplete repos.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know `xpuquant`. Cheap, repeatable, and harmless to vLLM where it does not fit."""
    try:
        from xpuquant.vllm import config, loading
    except ImportError as missing:
        import logging

        from xpuquant.vllm.versions import supported, vllm_version

        logging.getLogger("vllm.xpuquant").warning(
            "xpuquant is not active: it supports vLLM %s, this is %s (%s)",
            supported(),
            vllm_version(),
            missing,
        )
        return
    config.register()
    loading.register()
