"""tests/serving/vllm_plugin/generate.py, past two things that are in the way of vLLM on a CPU, whatever it loads.

Models that take images import torchvision, whose package index has no build for CPUs. The other build declares its
operators in a library that does not load here; declared without code they let it be imported, and a prompt without an
image calls none of them.

vLLM's CPU worker looks for Triton kernels in whatever is imported, by `vars(value).get("kernel")`. Models for which it
imports numba (Kimi-K2.5's processor) bring llvmlite's `lib`, which answers every name with a function of LLVM:
`__dict__`, too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GENERATE = Path(__file__).resolve().parents[2] / "tests" / "serving" / "vllm_plugin" / "generate.py"


def forked(asked: Callable[[], Any]) -> Any:
    """What a copy of this process answers: vLLM asks a new one what each architecture can do, which would know nothing
    of the operators."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(asked()))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def answer_no_special_names() -> None:
    """Let llvmlite's library have no attributes like `__dict__`, which no function of LLVM is called."""
    library = type(importlib.import_module("llvmlite.binding.ffi").lib)
    theirs = library.__getattr__

    def function(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return theirs(self, name)

    library.__getattr__ = function


if __name__ == "__main__":
    if find_spec("llvmlite") is not None:
        answer_no_special_names()
    if find_spec("torchvision") is not None:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = forked
    runpy.run_path(str(GENERATE), run_name="__main__")
