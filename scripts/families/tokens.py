"""tests/serving/vllm_plugin/generate.py, where torchvision is a build for GPUs and torch one for CPUs.

Models that take images import torchvision, whose package index has no build for CPUs. The other build declares its
operators in a library that does not load here; declared without code they let it be imported, and a prompt without an
image calls none of them.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    if find_spec("torchvision") is not None:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = forked
    runpy.run_path(str(GENERATE), run_name="__main__")
