"""Does it fit my GPU: KV caches of models whose shapes are published, shares of weights, rates that are promised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.conversion.cli.inspect_answers import inspected
from xpuquant.conversion.cli.tables import lines_of
from xpuquant.conversion.gpus import GIB, GPUS
from xpuquant.conversion.inspection import Fit
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.footprint import kv_cache
from xpuquant.conversion.plan.survey import survey_modules
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.conversion.rates import START_SECONDS, VERIFIED, seconds
from xpuquant.conversion.sources.open import open_source
from xpuquant.formats.architecture import state_groups

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"
MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
FP8 = FIXTURES / "llmcompressor-llama-fp8-static"
REFUSED = FIXTURES / "llmcompressor-llama-fp8-block-ragged"

# Numbers of the published config.json of each.
LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}
DEEPSEEK_V3 = LLAMA | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_key_value_heads": 128}
GPT_OSS = {
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_size": 2880,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
QWEN3_NEXT = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
}

NEMOTRON_H = {
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}
JAMBA = LLAMA | {"attn_layer_period": 8, "attn_layer_offset": 4}
ZAMBA2 = {
    "num_hidden_layers": 54,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 2560,
    "attention_head_dim": 160,
    "hybrid_layer_ids": [6, 12, 18, 24, 30, 36, 42, 47, 51],
}


@pytest.mark.parametrize(
    ("config", "tokens", "ranks", "nbytes"),
    [
        (LLAMA, 1, 1, 131072),  # 128 KiB a token, as is well known of Llama-3.1-8B
        (LLAMA, 8192, 1, 1 << 30),
        (LLAMA, 8192, 4, 1 << 28),
        (LLAMA, 8192, 16, 1 << 27),  # a head at least
        (DEEPSEEK_V3, 1, 1, 61 * 576 * 2),
        (DEEPSEEK_V3, 1, 8, 61 * 576 * 2),
        (GPT_OSS, 8192, 1, 12 * (8192 + 128) * 2 * 8 * 64 * 2),
        (GPT_OSS, 100, 1, 24 * 100 * 2 * 8 * 64 * 2),
        (QWEN3_NEXT, 10, 1, 12 * 10 * 2 * 2 * 256 * 2),
        (NEMOTRON_H, 10, 1, 6 * 10 * 2 * 2 * 128 * 2),
        (JAMBA, 10, 1, 4 * 10 * 2 * 8 * 128 * 2),
        (ZAMBA2, 10, 1, 9 * 10 * 2 * 32 * 160 * 2),
        (LLAMA | {"layers_block_type": ["mamba", "moe", "full_attention", "moe"] * 8}, 1, 1, 131072 // 4),
        (LLAMA | {"layer_types": ["mamba", "attention"] * 16}, 1, 1, 131072 // 2),  # Granite 4
        (LLAMA | {"attn_layer_indices": [9, 18, 27]}, 1, 1, 131072 * 3 // 32),  # Bamba
        (LLAMA | {"hybrid_override_pattern": "M*"}, 1, 1, 131072),  # not of this model: errs upwards
    ],
)
def test_kv_caches_of_known_models(config: dict[str, object], tokens: int, ranks: int, nbytes: int) -> None:
    assert kv_cache(config, tokens, ranks) == nbytes
    assert kv_cache(config, tokens, ranks, element=1) == nbytes // 2


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": "x"}, {"num_hidden_layers": 3}, LLAMA | {"hidden_size": -1}]
)
def test_a_config_that_does_not_say_enough(config: dict[str, object]) -> None:
    assert kv_cache(config, 1, 1) is None


def test_what_each_gpu_holds() -> None:
    found = xpuquant.inspect(SOURCE, tensor_parallel=[1, 2, 4])
    assert isinstance(found, xpuquant.Inspection)
    planned = xpuquant.plan(SOURCE)
    whole = sum(tensor.nbytes for shard in planned.shards for tensor in shard.tensors)
    assert found.nbytes == whole == found.fits[0].weights
    assert [fit.gpus for fit in found.fits] == [1, 2], "four do not split it"
    assert whole // 2 < found.fits[1].weights < whole, "norms are on both"
    longer = xpuquant.inspect(SOURCE, context=16384)
    assert isinstance(longer, xpuquant.Inspection)
    assert longer.fits[0].kv_cache == 2 * (found.fits[0].kv_cache or 0)


def test_which_gpu_holds_it() -> None:
    names = {gpu.name: gpu for gpu in GPUS}
    assert [gpu.gib for gpu in GPUS] == sorted(gpu.gib for gpu in GPUS) and len(names) == len(GPUS)
    model = Fit(1, 8192, weights=9 * GIB, kv_cache=1 * GIB, kv_cache_fp8=GIB // 2)
    assert not model.held_by(names["Arc B580"].usable) and model.held_by(names["Arc Pro B50"].usable)
    assert model.held_by(int(9.6 * GIB), fp8=True) and not model.held_by(int(9.6 * GIB))


def test_what_another_scheme_would_need() -> None:
    """A model of 8 bits is told what it would be in 4; one that is in 4 is not."""
    wide = xpuquant.inspect(FP8, tensor_parallel=[1])
    assert isinstance(wide, xpuquant.Inspection)
    (fit,) = wide.fits
    quantized = sum(module.nbytes for module in wide.modules)
    assert fit.weights_int4 is not None and fit.weights - quantized < fit.weights_int4 < fit.weights - 0.4 * quantized
    assert fit.held_by(fit.weights_int4 + (fit.kv_cache or 0), int4=True)
    assert not fit.held_by(fit.weights_int4 + (fit.kv_cache or 0))
    narrow = xpuquant.inspect(SOURCE)
    assert isinstance(narrow, xpuquant.Inspection) and narrow.fits[0].weights_int4 is None
    large = Fit(1, 8192, weights=40 * GIB, kv_cache=GIB, kv_cache_fp8=GIB // 2, weights_int4=21 * GIB)
    said = "\n".join(shown(replace(wide, fits=(large,))))
    assert "as int4: were the model quantized to 4 bits" in said
    assert re.search(r"Arc Pro B70 +32 GiB +more than 1 +more than 1 +1$", said, re.MULTILINE)
    assert "as int4" not in "\n".join(shown(wide)), "it fits as it is"


def shown(found: xpuquant.Inspection) -> Iterator[str]:
    """The answer of `inspect`, line by line."""
    for part in inspected(found).parts:
        yield from [part] if isinstance(part, str) else (line for _, line in lines_of(part))


@pytest.mark.parametrize(("source", "left_out"), [(SOURCE, False), (MOE, True)])
def test_experts_are_promised_no_gpu_that_refuses_them(
    source: Path, left_out: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {gpu.generation for gpu in GPUS if gpu.computes_experts} <= {"Xe2", "Xe3"}
    assert run(["inspect", str(source)]) == 0
    listed, found, rest = capsys.readouterr().out.partition("not listed: ")
    assert bool(found) is left_out
    for gpu in GPUS:
        assert (gpu.name in listed) is (gpu.computes_experts or not left_out), gpu.name
        assert (gpu.name in rest) is (left_out and not gpu.computes_experts), gpu.name
    assert ("experts are computed on Xe2 and Xe3 only" in " ".join(rest.split())) is left_out


def test_a_model_that_does_not_convert_is_promised_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(REFUSED)]) == 0
    said = capsys.readouterr().out
    assert "--on-unsupported dequantize stores them as bf16" in said
    assert "GPUs" not in said and "yes" not in said
    assert run(["inspect", str(REFUSED), "--on-unsupported", "dequantize", "--tp", "1", "--context", "100"]) == 0
    assert "KV cache of 100 tokens" in capsys.readouterr().out


def test_promised_rates_are_those_measured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    measured = {
        name: float(rate)
        for name, rate in re.findall(r"^\| (\w+) → xpu, verified \|.* s, ([\d.]+) GB/s", page, re.MULTILINE)
    }
    names = {"ct": "compressed-tensors"}
    for name, rate in measured.items():
        if name in ("gptq2", "gptq3"):
            continue
        assert VERIFIED[names.get(name, name)] == pytest.approx(rate * 1e9, rel=0.3), name
    assert seconds(10**9, ("gptq", "awq")) == seconds(10**9, ("awq",)) > seconds(10**9, ("gptq",))


def test_a_small_model_is_said_to_take_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| (?:loading the kernels|start, plan, reports, index) \| ([\d.]+) s", page, re.MULTILINE)
    assert len(rows) == 2 and sum(map(float, rows)) == START_SECONDS
    assert run(["inspect", str(SOURCE)]) == 0
    said = capsys.readouterr().out
    assert "converting takes about 1.0 s on two cores, verified, 1.0 s of it to start and to load kernels" in said


# What is read and written, and one module


def test_formats_lists_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    from xpuquant.formats.layouts import layouts_by_name
    from xpuquant.formats.readers import READERS

    assert run(["formats"]) == 0
    said = capsys.readouterr().out
    assert all(reader.name in said for reader in READERS) and all(name in said for name in layouts_by_name())


@pytest.mark.parametrize("asked", ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.qweight"])
def test_a_module_is_explained_by_its_name_or_that_of_a_tensor(asked: str) -> None:
    found = xpuquant.explain(SOURCE, asked)
    assert isinstance(found, xpuquant.Explanation) and found.outcome is not None
    planned = {module.name: module for module in xpuquant.plan(SOURCE).modules}
    assert found.outcome == planned["model.layers.0.mlp.down_proj"] and found.refused is None
    assert {tensor.name.rpartition(".")[2] for tensor in found.tensors} >= {"qweight", "qzeros", "scales"}
    assert sum(tensor.nbytes for tensor in found.written) == found.outcome.nbytes


def test_a_refused_module_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    inspected = xpuquant.inspect(REFUSED)
    assert isinstance(inspected, xpuquant.Inspection)
    name, reason = next(iter(inspected.refused.items()))
    assert run(["explain", str(REFUSED), name]) == 0
    said = capsys.readouterr().out
    assert name in said and reason in said and "made of" in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("model.layers.0.mlp.down_prj", "did you mean model.layers.0.mlp.down_proj?"),
        ("model.norm", "is not quantized: it stays as it is"),
        ("nothing", "no module is called nothing"),
    ],
)
def test_what_is_no_quantized_module_is_said(asked: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(SOURCE), asked]) == 2
    assert said in capsys.readouterr().err


def test_a_mixer_whose_groups_of_states_several_gpus_would_share() -> None:
    """vLLM repeats the group on each, and the plugin refuses that at load."""
    planned = survey_modules(open_source(str(SOURCE)).checkpoint, Options()).planned
    one = next(each for each in planned if each.conversion.scheme)
    mixer = replace(one, conversion=replace(one.conversion, name="model.layers.0.mamba.in_proj"))
    assert problems([mixer], 2, state_groups=2) == problems([mixer], 2)
    assert problems([mixer], 2, state_groups=1) == {"model.layers.0.mamba.in_proj": "1 group of states for 2 GPUs"}
    assert problems([one], 2, state_groups=1) == problems([one], 2)
    for config, groups in (
        ({"mamba_n_groups": 1}, 1),
        ({"mamba_ngroups": 2}, 2),
        ({"mamba_num_heads": 64, "n_groups": 8}, 8),
        ({"n_groups": 8}, None),
    ):
        assert state_groups(config) == groups
