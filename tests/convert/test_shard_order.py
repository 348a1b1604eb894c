"""Where tensors lie in a shard: what engines join, lies side by side."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from support.checkpoints import SPOILT, all_checkpoints, refused

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.sources.open import open_source

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
NAMES = sorted(all_checkpoints().keys() - refused().keys() - SPOILT.keys())


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_engines_join_are_one_run_of_bytes(name: str, max_shard_size: str) -> None:
    """In the order of the joined tensor, where the header puts them; of each shard those that lie in it.

    Every fixture of ours has such a group; of the larger set, whose names have a slash, one has a single
    projection per layer.
    """
    plan = make_plan(open_source(str(all_checkpoints()[name])).checkpoint, Options(max_shard_size=max_shard_size))
    found = 0
    for shard in plan.shards:
        places = {key: entry["data_offsets"] for key, entry in json.loads(shard.header[8:]).items() if key[0] != "_"}
        for key in places:
            module, _, suffix = key.rpartition(".")
            parent, _, leaf = module.rpartition(".")
            group: tuple[str, ...] = next((members for members in JOINED if leaf in members), ())
            if suffix in ("qweight", "weight"):
                beside = [places[one] for member in group if (one := f"{parent}.{member}.{suffix}") in places]
                assert all(one[1] == after[0] for one, after in pairwise(beside)), key
                found += len(beside) > 1
    assert found or max_shard_size != "5GB" or "/" in name


def test_nothing_else_moves() -> None:
    """The portable layout, which its own loaders copy, keeps the order of the source."""
    source = open_source(str(all_checkpoints()["llmcompressor-llama-fp8-dynamic"])).checkpoint
    for layout in ("xpu", "compressed-tensors"):
        (shard,) = make_plan(source, Options(layout=layout)).shards
        weights = [tensor.name for tensor in shard.tensors if tensor.name.endswith(".weight")]
        members = [name.split(".")[-2][0] for name in weights if ".layers.0.self_attn." in name]
        assert "".join(members) == ("qkvo" if layout == "xpu" else "koqv")
