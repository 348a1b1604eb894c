"""Folders as people publish them: which file holds the weights, and which the quantization config.

Each case is rebuilt small from the public report named beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.floats import FP8
from support.ints import DOWN, Q, Tensors, awq, awq_config, ct_config, gptq, gptq_config, ints, pack_quantized

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.repo.assemble import PRODUCER
from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import DamagedError, UsageError, XpuquantError

WEIGHT = ints()
QUANTIZED = {f"{DOWN}.{suffix}": tensor for suffix, tensor in gptq(WEIGHT).items()}
OTHER = {f"{Q}.{suffix}": tensor for suffix, tensor in gptq(WEIGHT).items()}
FLOAT = {f"{DOWN}.weight": np.ones((16, 64), np.float16)}
LORA = {
    f"base_model.model.{DOWN}.lora_A.weight": np.ones((4, 64), np.float16),
    f"base_model.model.{DOWN}.lora_B.weight": np.ones((16, 4), np.float16),
}
MISTRAL = {"layers.0.feed_forward.w2.weight": np.ones((16, 64), np.float16)}


def folder_of(folder: Path, files: Mapping[str, Any], quantization: Any = None, **config: Any) -> Path:
    """A model folder: safetensors files with their tensors, JSON for everything else."""
    folder.mkdir()
    said = gptq_config() if quantization is None else quantization
    whole = {"model_type": "llama", **config} | ({"quantization_config": said} if said else {})
    (folder / "config.json").write_text(json.dumps(whole))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({key: np.ascontiguousarray(array) for key, array in content.items()}, folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
    return folder


def index_of(**files: Tensors) -> dict[str, Any]:
    """An index: file name with `_` for `-` and no ending → its tensors."""
    named = {f"{name.replace('_', '-')}.safetensors": tensors for name, tensors in files.items()}
    return {"weight_map": {tensor: name for name, tensors in named.items() for tensor in tensors}}


INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BOTH = index_of(model_00001_of_00002=QUANTIZED, model_00002_of_00002=OTHER)

TAKEN: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    # vllm-project/vllm#40765, #4989: Ministral and Mistral repos carry both.
    "Mistral's copy beside one file": (
        {"model.safetensors": QUANTIZED, "consolidated.safetensors": MISTRAL, "params.json": {}},
        ("consolidated.safetensors", "params.json"),
        "consolidated.safetensors is left out: Mistral's copy",
    ),
    # mistralai/Mistral-Large-3-675B-Instruct-2512 (huggingface/huggingface_hub#3645): an index of its own.
    "Mistral's copy in shards beside an index": (
        {
            ONE: QUANTIZED,
            TWO: OTHER,
            INDEX: BOTH,
            "consolidated-00001-of-00001.safetensors": MISTRAL,
            "consolidated.safetensors.index.json": {"weight_map": {"a": "consolidated-00001-of-00001.safetensors"}},
        },
        ("consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json"),
        "consolidated-00001-of-00001.safetensors is not in model.safetensors.index.json: left out",
    ),
    # haotian-liu/LLaVA#1018, Blaizzy/mlx-vlm#1464: an adapter left beside the merged model.
    "an adapter of PEFT": (
        {"model.safetensors": QUANTIZED, "adapter_model.safetensors": LORA, "adapter_config.json": {"r": 4}},
        ("adapter_model.safetensors", "adapter_config.json"),
        "adapter_model.safetensors is left out: an adapter",
    ),
    # ml-explore/mlx-lm writes adapters.safetensors, huggingface/diffusers pytorch_lora_weights.safetensors.
    "adapters of other tools": (
        {"model.safetensors": QUANTIZED, "adapters.safetensors": LORA, "pytorch_lora_weights.safetensors": LORA},
        ("adapters.safetensors", "pytorch_lora_weights.safetensors"),
        "adapters.safetensors is left out: an adapter",
    ),
    # microsoft/Phi-4-multimodal-instruct keeps LoRA sets in folders of their own.
    "adapters in folders": (
        {
            "model.safetensors": QUANTIZED,
            "vision-lora/adapter_model.safetensors": LORA,
            "vision-lora/adapter_config.json": {"r": 4},
        },
        ("vision-lora/adapter_model.safetensors", "vision-lora/adapter_config.json"),
        "",
    ),
    # huggingface/transformers modeling_utils.py `_add_variant`: variants are opened only when asked for.
    "a variant in half precision": (
        {
            "model.safetensors": QUANTIZED,
            "model.fp16.safetensors": FLOAT,
            "model.safetensors.index.fp16.json": {"weight_map": {f"{DOWN}.weight": "model.fp16.safetensors"}},
        },
        ("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
        "model.fp16.safetensors is left out: a variant",
    ),
    # huggingface/accelerate writes optimizer states beside the model while training.
    "the state of a training run": (
        {"model.safetensors": QUANTIZED, "optimizer.safetensors": {"state.0": np.ones(4, np.float32)}},
        ("optimizer.safetensors",),
        "optimizer.safetensors is left out: state of a training run",
    ),
    # ddalcu/mlx-serve#465: the original's index was uploaded with the quantized file, its shards were not.
    "the index of shards that are gone": (
        {"model.safetensors": QUANTIZED, INDEX: BOTH},
        (),
        "model.safetensors.index.json lists files that are not there: ignored",
    ),
    # openai/gpt-oss-120b: original/ and metal/ hold the same weights for other programs.
    "folders of other weights": (
        {"model.safetensors": QUANTIZED, "original/model.safetensors": FLOAT, "metal/model.bin": {}},
        ("original/model.safetensors", "metal/model.bin"),
        "",
    ),
    # TheBloke's GPTQ repos: AutoGPTQ's own file name, which `model_file_base_name` repeats.
    "one file under AutoGPTQ's name": ({"gptq_model-4bit-128g.safetensors": QUANTIZED}, (), ""),
    # The same in shards, whose index has their stem.
    "AutoGPTQ's shards": (
        {
            "gptq-4bit-00001-of-00001.safetensors": QUANTIZED,
            "gptq-4bit.safetensors.index.json": index_of(gptq_4bit_00001_of_00001=QUANTIZED),
        },
        (),
        "",
    ),
    # vllm weight_utils.py: shards without an index are all loaded.
    "shards whose index was not uploaded": ({ONE: QUANTIZED, TWO: OTHER}, (), ""),
    # huggingface/transformers modeling_utils.py: opened only where there are no safetensors.
    "an index of pickled weights": (
        {"model.safetensors": QUANTIZED, "pytorch_model.bin.index.json": {"weight_map": {}}},
        ("pytorch_model.bin.index.json",),
        "",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_only_the_weights_of_the_model_are_taken(case: str, tmp_path: Path) -> None:
    files, left, note = TAKEN[case]
    source = open_source(str(folder_of(tmp_path / "in", files)))
    taken = {tensor.name for tensor in source.checkpoint.tensors.values()}
    assert taken in (set(QUANTIZED), set(QUANTIZED) | set(OTHER)), "a foreign tensor, or one too few"
    plan = make_plan(source.checkpoint, Options())
    assert {module.conversion.name for module in plan.modules} <= {DOWN, Q} and not plan.passed
    assert set(left) <= set(source.left_files) and not set(left) & set(source.extra_files)
    assert any(note in said for said in plan.notes) if note else not plan.notes


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # Blaizzy/mlx-vlm#1464: the quantized file beside the original's shards and their index.
    "one file and an index of others": (
        {"model.safetensors": QUANTIZED, ONE: FLOAT, TWO: MISTRAL, INDEX: BOTH},
        ("Transformers loads model.safetensors", f"vLLM the files that {INDEX} lists ({ONE} and 1 more)"),
    ),
    # vllm weight_utils.py `filter_duplicate_safetensors_files`: without an index nothing is left out.
    "one file and another export": (
        {"model.safetensors": FLOAT, "gptq_model-4bit-128g.safetensors": QUANTIZED},
        ("Transformers loads model.safetensors alone, vLLM gptq_model-4bit-128g.safetensors as well",),
    ),
    # intel/auto-round#1526, vllm-project/llm-compressor#1630: draft layers in a file of their own.
    "one file and draft layers": (
        {"model.safetensors": QUANTIZED, "mtp.safetensors": {"mtp.0.weight": np.ones(4, np.float16)}},
        ("Transformers loads model.safetensors alone, vLLM mtp.safetensors as well",),
    ),
    # Neph0s/CoSER#3, sgl-project/sglang#32279: folders whose index and shards are of two uploads.
    "one file and a shard that was left": (
        {"model.safetensors": QUANTIZED, ONE: FLOAT},
        ("Transformers loads model.safetensors alone", ONE),
    ),
    # sgl-project/sglang#35107: Lightricks/LTX-2.5-Diffusers has a split in four beside one in eight.
    "shards of two exports": (
        {ONE: QUANTIZED, TWO: OTHER, "model-00001-of-00001.safetensors": FLOAT},
        ("model-00001-of-00001.safetensors", TWO, "are of two exports"),
    ),
    "an incomplete set beside a whole file": (
        {ONE: FLOAT, "gptq_model-4bit.safetensors": QUANTIZED},
        ("shard 2 of 2 of model is missing, gptq_model-4bit.safetensors lies beside",),
    ),
    "two files with the same tensors": (
        {"a.safetensors": QUANTIZED, "b.safetensors": QUANTIZED},
        ("is in both a.safetensors and b.safetensors, and no index says which is meant",),
    ),
    # huggingface/transformers before 4.40 and hand-made splits: a tensor in two shards, the index not uploaded.
    "two shards with one tensor": (
        {ONE: QUANTIZED | FLOAT, TWO: OTHER | FLOAT},
        (f"'{DOWN}.weight' is in both {ONE} and {TWO}, and no index says which is meant; add one",),
    ),
    # An adapter by another name, among files of which no index says what they are.
    "an adapter called something else": (
        {"gptq_model-4bit.safetensors": QUANTIZED, "my-finetune.safetensors": LORA},
        ("my-finetune.safetensors is an adapter ('base_model.model.",),
    ),
    "nothing but an adapter": (
        {"adapter_model.safetensors": LORA, "adapter_config.json": {}},
        ("adapter_model.safetensors is an adapter, not weights of the model, and there are no others",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_engines_load_different_files_both_are_named(case: str, tmp_path: Path) -> None:
    files, parts = REFUSED[case]
    with pytest.raises(UsageError) as raised:
        open_source(str(folder_of(tmp_path / "in", files)))
    assert all(part in str(raised.value) for part in parts)


def test_a_file_that_only_transformers_opens_is_named(tmp_path: Path) -> None:
    """`transformers_weights` of config.json (modeling_utils.py, Transformers 5)."""
    files = {"model.safetensors": QUANTIZED, "other.safetensors": FLOAT, INDEX: index_of(model=QUANTIZED)}
    with pytest.raises(UsageError, match=r"Transformers loads other\.safetensors .*, vLLM model\.safetensors"):
        open_source(str(folder_of(tmp_path / "a", files, transformers_weights="other.safetensors")))
    source = open_source(str(folder_of(tmp_path / "b", files, transformers_weights="model.safetensors")))
    assert "transformers_weights" not in make_plan(source.checkpoint, Options()).output_config(
        source.checkpoint.config, PRODUCER
    )


def test_what_is_left_out_explains_that_nothing_is_quantized(tmp_path: Path) -> None:
    """The quantized file is the one that the index does not list."""
    files = {ONE: FLOAT, INDEX: index_of(model_00001_of_00002=FLOAT), "gptq_model-4bit.safetensors": QUANTIZED}
    source = open_source(str(folder_of(tmp_path / "in", files)))
    with pytest.raises(UsageError, match=r"nothing is quantized.*gptq_model-4bit\.safetensors is not in"):
        make_plan(source.checkpoint, Options())


def test_weights_of_further_modules_of_sentence_transformers_are_copied(tmp_path: Path) -> None:
    """google/embeddinggemma-300m: 2_Dense/ and 3_Dense/ are parts of the model, in files of their own."""
    modules = [{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}]
    files = {"model.safetensors": QUANTIZED, "modules.json": modules, "2_Dense/model.safetensors": FLOAT}
    source = open_source(str(folder_of(tmp_path / "in", files | {"3_Dense/model.safetensors": FLOAT})))
    assert "2_Dense/model.safetensors" in source.extra_files and "3_Dense/model.safetensors" in source.left_files


def test_tensors_of_another_checkpoint_in_a_shard_that_is_used_again_are_ignored(tmp_path: Path) -> None:
    """vllm-project/vllm#54230: an AWQ checkpoint takes a few tensors out of the original's shards, which hold the
    experts in FP8 as well."""
    reused = {"model.embed.weight": np.ones((4, 4), np.float16), f"{DOWN}.weight": np.ones((16, 64), np.float16)}
    forgotten = {f"{DOWN}.bias": np.ones(16, np.float16), "model.norm.weight": np.ones(4, np.float16)}
    listed = {**dict.fromkeys(QUANTIZED, ONE), "model.embed.weight": TWO}
    files = {ONE: QUANTIZED | forgotten, TWO: reused, INDEX: {"weight_map": listed}}
    source = open_source(str(folder_of(tmp_path / "in", files)))
    assert set(source.checkpoint.tensors) == {*QUANTIZED, *forgotten, "model.embed.weight"}
    assert f"{TWO} holds '{DOWN}.weight', which the index does not list" in " ".join(source.checkpoint.notes)


FP8_TENSORS: Tensors = {
    f"{DOWN}.weight": np.full((16, 64), 56, np.uint8).view(FP8["e4m3"]),
    f"{DOWN}.weight_scale": np.array(0.5, np.float32),
}
CT_TENSORS = {f"{DOWN}.{suffix}": tensor for suffix, tensor in pack_quantized(WEIGHT, zeros="none").items()}
AWQ_TENSORS = {f"{DOWN}.{suffix}": tensor for suffix, tensor in awq(WEIGHT).items()}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": {"quant_algo": "FP8"}}

PLACES: dict[str, tuple[dict[str, Any], Tensors, dict[str, Any]]] = {
    # vllm-project/vllm#15784, NVIDIA/Model-Optimizer#228: nvidia/Llama-3.1-8B-Instruct-FP8.
    "hf_quant_config.json": ({}, FP8_TENSORS, {"hf_quant_config.json": MODELOPT}),
    # NVIDIA/TensorRT-LLM#14561: the same, of an algorithm with a scale before the weight, here without any.
    "hf_quant_config.json with pre_quant_scale": (
        {},
        FP8_TENSORS,
        {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8", "pre_quant_scale": True}}},
    ),
    # vllm-project/vllm#11122, #17725: OpenGVLab/InternVL2-*-AWQ.
    "llm_config": ({"llm_config": {"quantization_config": awq_config()}}, AWQ_TENSORS, {}),
    # moonshotai/Kimi-K2.5.
    "text_config": ({"text_config": {"quantization_config": ct_config()}}, CT_TENSORS, {}),
    # deepseek-ai/Janus, DeepSeek-VL2.
    "language_config": ({"language_config": {"quantization_config": gptq_config()}}, QUANTIZED, {}),
    # Qwen/Qwen2.5-Omni-7B-GPTQ-Int4, Qwen3-Omni.
    "thinker_config": ({"thinker_config": {"text_config": {"quantization_config": gptq_config()}}}, QUANTIZED, {}),
    "two parts that agree": (
        {
            "thinker_config": {"quantization_config": gptq_config()},
            "talker_config": {"quantization_config": gptq_config()},
        },
        QUANTIZED,
        {},
    ),
    "a part of a part in a list": ({"parts": [{"quantization_config": gptq_config()}]}, QUANTIZED, {}),
    # neuralmagic/* of 2024.
    "compression_config": ({"compression_config": ct_config()}, CT_TENSORS, {}),
    "compression_config of a part": ({"text_config": {"compression_config": ct_config()}}, CT_TENSORS, {}),
    # casper-hansen/AutoAWQ.
    "quant_config.json": ({}, AWQ_TENSORS, {"quant_config.json": {"zero_point": True, "q_group_size": 32, "w_bit": 4}}),
    # AutoGPTQ/AutoGPTQ.
    "quantize_config.json": ({}, QUANTIZED, {"quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}}),
    # intel/auto-round.
    "quantization_config.json": ({}, QUANTIZED, {"quantization_config.json": gptq_config()}),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_quantization_config_is_found_and_none_is_left(case: str, tmp_path: Path) -> None:
    config, tensors, files = PLACES[case]
    files = {"model.safetensors": tensors, **files}
    source = open_source(str(folder_of(tmp_path / "in", files, quantization=False, **config)))
    plan = make_plan(source.checkpoint, Options())
    assert [module.conversion.name for module in plan.modules] == [DOWN]
    written = plan.output_config(source.checkpoint.config, PRODUCER)
    assert written.pop("quantization_config")["quant_method"] == "xpuquant"
    assert "quantization_config" not in json.dumps(written) and "compression_config" not in json.dumps(written)
    assert not [name for name in source.extra_files if "quant" in name]


def test_files_that_describe_the_sources_quantization_stay_behind(tmp_path: Path) -> None:
    files = (
        "hf_quant_config.json",
        "quant_config.json",
        "my_quantization_config.json.bak.json",
        "quantize_config_v2.json",
    )
    written = {"model.safetensors": QUANTIZED, **{name: {} for name in files}, "generation_config.json": {}}
    source = open_source(str(folder_of(tmp_path / "in", written)))
    assert source.extra_files == ("generation_config.json",) and set(files) <= set(source.left_files)


def test_a_file_of_an_earlier_quantization_is_ignored(tmp_path: Path) -> None:
    """A folder that was quantized again: the file beside config.json is the one before's."""
    files = {"model.safetensors": FP8_TENSORS, "quantize_config.json": {"bits": 3, "group_size": 16, "desc_act": True}}
    source = open_source(str(folder_of(tmp_path / "in", files, {"quant_method": "fp8"})))
    assert source.checkpoint.quantization == {"quant_method": "fp8"}
    assert "quantize_config.json describes another quantization than config.json" in source.checkpoint.notes[0]
    assert "quantize_config.json" in source.left_files


def test_parts_that_disagree_are_named(tmp_path: Path) -> None:
    parts = {
        "thinker_config": {"quantization_config": gptq_config(bits=4)},
        "talker_config": {"quantization_config": gptq_config(bits=8)},
    }
    files = {"model.safetensors": QUANTIZED}
    with pytest.raises(
        UsageError, match=r"bits=4 in thinker_config\.quantization_config and 8 in talker_config\.quant"
    ):
        open_source(str(folder_of(tmp_path / "a", files, quantization=False, **parts)))
    source = open_source(str(folder_of(tmp_path / "b", files, **parts)))
    assert "8 in talker_config" in source.checkpoint.notes[0], "what stands at the top is what loaders read"


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        # Names that vLLM (quantization/__init__.py) and SGLang (layers/quantization) give methods.
        *((name, QUANTIZED) for name in ("gptq_marlin", "GPTQ", "auto-gptq", "auto_gptq", "marlin", "moe_wna16")),
        *((name, QUANTIZED) for name in ("intel/auto-round", "auto_round", "autoround", "inc")),
        *((name, AWQ_TENSORS) for name in ("awq_marlin", "auto_awq", "AWQ")),
        *(
            (name, FP8_TENSORS)
            for name in ("fp8_e4m3", "fbgemm_fp8", "ptpc_fp8", "modelopt", "modelopt_mixed", "quark")
        ),
        *((name, FP8_TENSORS) for name in ("w8a8_fp8", "compressed_tensors", "modelopt_fp4")),
    ],
)
def test_old_names_of_methods_leave_it_to_the_tensors(method: str, tensors: Tensors, tmp_path: Path) -> None:
    config = {**gptq_config(checkpoint_format=None), "quant_method": method}
    source = open_source(str(folder_of(tmp_path / "in", {"model.safetensors": tensors}, config)))
    assert [module.conversion.name for module in make_plan(source.checkpoint, Options()).modules] == [DOWN]


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "fp_quant", "quip", "svdquant", "torchao"])
def test_methods_with_arithmetic_of_their_own_are_refused(method: str, tmp_path: Path) -> None:
    """FP-Quant rotates online (huggingface/transformers integrations/fp_quant.py); QuIP# has signs beside the codes."""
    source = open_source(
        str(folder_of(tmp_path / "in", {"model.safetensors": QUANTIZED}, {"quant_method": method, "bits": 4}))
    )
    with pytest.raises(XpuquantError, match=f"quant_method '{method}' is not supported"):
        make_plan(source.checkpoint, Options())


def test_a_shard_that_the_index_lists_is_missing(tmp_path: Path) -> None:
    """Damage, and no question of which file is meant."""
    with pytest.raises(DamagedError, match=f"{TWO} is missing"):
        open_source(str(folder_of(tmp_path / "in", {ONE: QUANTIZED, INDEX: BOTH})))


NO_MODEL: dict[str, tuple[tuple[str, ...], str]] = {
    # unsloth/*-GGUF and thousands like it: a config and files of llama.cpp.
    "GGUF alone": (("config.json", "model-Q4_K_M.gguf"), "model-Q4_K_M.gguf: weights of another format"),
    "pickles alone": (("config.json", "pytorch_model.bin"), "pickled weights are never opened"),
    # onnx-community/*: the weights are a folder's.
    "weights in a folder": (
        ("config.json", "int4/model.safetensors"),
        "only below it: int4; name the folder that has both",
    ),
    # Repos that keep one quantization in each folder.
    "models in folders": (
        ("README.md", "int4/config.json", "int4/model.safetensors", "int8/config.json"),
        "has no config.json; the model is a folder inside it (int4, int8): convert that folder",
    ),
    # mistralai/*: some repos have Mistral's own format only.
    "Mistral's format alone": (("params.json", "consolidated.safetensors"), "params.json: Mistral's own format"),
    "nothing": (("README.md",), "has no config.json; is it a model folder?"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_a_folder_that_is_no_model_is_told_what_it_is(case: str, tmp_path: Path) -> None:
    names, said = NO_MODEL[case]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError) as raised:
        open_source(str(tmp_path))
    assert said in str(raised.value)


def test_the_pointer_that_git_leaves_is_told_from_damage(tmp_path: Path) -> None:
    """`git clone` of a Hub repo without Git LFS: a text file of three lines under the name of each shard."""
    folder = folder_of(tmp_path / "in", {})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(DamagedError, match=r"model\.safetensors: is Git LFS's pointer .* run `git lfs pull`"):
        open_source(str(folder))


def test_a_bitsandbytes_config_of_before_it_had_a_name(tmp_path: Path) -> None:
    """huggingface/transformers 4.30: `quant_method` came later."""
    files = {"model.safetensors": FLOAT}
    source = open_source(str(folder_of(tmp_path / "in", files, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})))
    with pytest.raises(UsageError, match="quant_method 'bitsandbytes' is not supported"):
        make_plan(source.checkpoint, Options())
