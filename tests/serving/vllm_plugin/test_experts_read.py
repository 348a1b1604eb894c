"""What of a file is read while a rank loads its experts: which pages of it the kernel then has in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import EXPERTS

E, H, I = 8, 8192, 2048
NAME = "gate_up_proj"
"""uint8 `[8, 4096, 4096]`: 16 MiB an expert."""
PAGES = E * 2 * I * (H // 2) // mmap.PAGESIZE


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> list[bool]:
    """Page by page."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_ubyte.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
    assert not failed, os.strerror(ctypes.get_errno())
    return [bool(page & 1) for page in pages]


@pytest.mark.parametrize("rank", [0, 1])
def test_experts_of_other_ranks_are_not_read(rank: int, tmp_path: Path) -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    from xpuquant.vllm.experts import XpuquantExpertsMethod

    path = tmp_path / "model.safetensors"
    stored = torch.arange(E, dtype=torch.uint8).view(E, 1, 1).expand(E, 2 * I, H // 2).contiguous()
    save_file({NAME: stored}, path)
    forget(path)
    if sum(resident(path)) > 16:
        pytest.skip("this file system keeps files in memory")

    parallel = FusedMoEParallelConfig(
        tp_size=1,
        pcp_size=1,
        dp_size=1,
        ep_size=2,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=rank,
        sp_size=1,
        use_ep=True,
        all2all_backend="naive",
        enable_eplb=False,
    )
    experts = ExpertMapManager(64, 2, E, 0, None, parallel, "linear", False)
    param = torch.nn.Parameter(torch.zeros(E // 2, 2 * I, H // 2, dtype=torch.uint8), requires_grad=False)
    layer = SimpleNamespace(expert_map=experts.expert_map, **{NAME: param})
    method = XpuquantExpertsMethod.__new__(XpuquantExpertsMethod)
    method.scheme, method.prefix = EXPERTS["int4"], "experts"
    method.moe = SimpleNamespace(moe_parallel_config=parallel)
    with safe_open(path, "pt") as file:
        method.load(layer, NAME, file.get_tensor(NAME))
    pages = resident(path)

    assert torch.equal(param, stored[rank * E // 2 :][: E // 2])
    halves = pages[: PAGES // 2], pages[-PAGES // 2 :]
    ours, others = halves if rank == 0 else halves[::-1]
    assert sum(ours) > 0.99 * len(ours)
    # The kernel reads ahead: a few windows, which on some disks are 8 MiB each. Measured: 24 MiB of 64.
    assert sum(others) < 0.5 * len(others)
