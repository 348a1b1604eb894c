"""Ways to spoil a checkpoint, each what a broken download, another tool or an enemy does. Deterministic in `random`."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

from support.fuzz.folder import Folder, fixtures, load
from xpuquant.formats.dtypes import BITS

Mutation = Callable[[random.Random, Folder], str]

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    4,
    5,
    8,
    16,
    31,
    32,
    33,
    64,
    127,
    128,
    2**31,
    2**63,
    10**30,
    -(2**63),
    0.5,
    4.0,
    float("nan"),
    float("inf"),
    "",
    "4",
    "gptq",
    "gptq_v2",
    "gptq_p",
    "int",
    "float",
    "group",
    "channel",
    "block",
    "tensor",
    "auto_round:auto_gptq",
    "auto_round:gptqmodel",
    "auto_round:auto_awq",
    "pack-quantized",
    "W4A16",
    "mxfp4-pack-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "../../etc/passwd",
    "é\u202e",
    "\x1b[31mred",
    "a\nb\rc",
    "\ud800",
    "x" * 5000,
    "(a+)+$",
    "re:(.*)*x",
    "re:[",
    "re:.*",
    "-:.*",
    "9" * 5000,
    "9" * 5000 + ".9",
    [],
    {},
    [[]],
    [None],
    [1],
    [128, 128],
    [0, 0],
    [-1, 128],
    ["128", None],
    ["re:(.*a)*$"],
    {"": 1},
    {"bits": "four"},
    [[[[[]]]]],
    {"a": {"b": {"c": {}}}},
    "gptqmodel",
    "awq",
    "auto-round",
    "fp8",
    "mxfp4",
    "compressed-tensors",
    "modelopt",
    "quark",
    "xpuquant",
    "gemm",
    "gemv",
    "gpt_oss",
    "0.12.0",
    "0.9.4",
    "16",
]

KEYS = [
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "dynamic",
    "extra_config",
    "config_groups",
    "format",
    "quant_method",
    "checkpoint_format",
    "packing_format",
    "backend",
    "version",
    "zero_point",
    "w_bit",
    "q_group_size",
    "lm_head",
    "modules_to_not_convert",
    "ignore",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
    "weight_block_size",
    "activation_scheme",
    "block_name_to_quantize",
    "data_type",
    "act_bits",
    "super_bits",
    "is_marlin_format",
    "meta",
    "quantization_status",
    "true_sequential",
    "static_groups",
    "pack_dtype",
    "autoround_version",
    "model_free",
    "provider",
    "targets",
    "weights",
    "num_bits",
    "type",
    "strategy",
    "symmetric",
    "block_structure",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "text_config",
    "model_type",
    "quantization_config",
    "compression_config",
    "auto_map",
    "architectures",
    "num_experts",
    "hidden_size",
    "num_local_experts",
    "tie_word_embeddings",
    "quant_algo",
]

DTYPES = sorted(BITS)


def odd(rng: random.Random) -> Any:
    """A bad value, of its own: it may be changed in turn."""
    return copy.deepcopy(rng.choice(ODD))


def names(rng: random.Random, folder: Folder) -> list[str]:
    """Tensor names, quantized ones first by chance."""
    quantized = [name for name in folder.tensors if not name.endswith((".weight", "norm.weight"))]
    return quantized if quantized and rng.random() < 0.8 else list(folder.tensors)


def pick(rng: random.Random, folder: Folder) -> str:
    return rng.choice(names(rng, folder))


def drop_tensor(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    del folder.tensors[name]
    return f"drop {name}"


def drop_module(rng: random.Random, folder: Folder) -> str:
    prefix = pick(rng, folder).rpartition(".")[0]
    folder.tensors = {name: t for name, t in folder.tensors.items() if not name.startswith(prefix + ".")}
    return f"drop module {prefix}"


def rename(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    prefix, _, suffix = name.rpartition(".")
    suffixes = [
        *sorted({other.rpartition(".")[2] for other in folder.tensors}),
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "weight",
        "bias",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_scale_inv",
        "input_scale",
        "gate_up_proj_blocks",
        "scale",
    ]
    new = rng.choice(
        [
            f"{prefix}.{rng.choice(suffixes)}",
            f"{rng.choice(list(folder.tensors)).rpartition('.')[0]}.{suffix}",
            re.sub(r"\d+", lambda m: rng.choice(["0", "00", "7", "99999999", "9" * 400, "٣", "-1", m[0]]), name),
            name.replace("experts", "expert").replace("self_attn", "mlp.experts.0"),
            name.upper(),
            f"{name}.",
            f".{name}",
            "." * rng.randint(1, 5),
            suffix,
            f"{prefix}.{{0-9}}.{suffix}",
            f"{prefix}\x1b[2J.{suffix}",
            "é" * 300 + f".{suffix}",
            f"../{name}",
            f"{name} ",
            "a" * 2000,
        ]
    )
    tensor = folder.tensors.pop(name)
    folder.tensors[new] = tensor
    return f"rename {name} to {new!r:.80}"


def copy_tensor(rng: random.Random, folder: Folder) -> str:
    source, target = pick(rng, folder), pick(rng, folder)
    folder.tensors[target] = folder.tensors[source]
    return f"{target} holds {source}"


def graft(rng: random.Random, folder: Folder) -> str:
    other = load(rng.choice(fixtures()))
    name = rng.choice(list(other.tensors))
    folder.tensors[name if rng.random() < 0.5 else pick(rng, folder)] = other.tensors[name]
    return f"graft {name} of {other.name}"


def graft_config(rng: random.Random, folder: Folder) -> str:
    other = load(rng.choice(fixtures()))
    if rng.random() < 0.5:
        folder.config = other.config
    elif isinstance(folder.config, dict):
        folder.config["quantization_config"] = other.config.get("quantization_config")
    return f"config of {other.name}"


def resize(content: bytes, size: int) -> bytes:
    return (content * (size // max(1, len(content)) + 1))[:size] if content else bytes(size)


def reshape(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    dtype, shape, content = folder.tensors[name]
    new = list(shape)
    how = rng.randrange(9)
    if how == 0:
        new = new[::-1]
    elif how == 1:
        new = [1]
        for size in shape:
            new[0] *= size
    elif how == 2:
        new = [1, *new]
    elif how == 3:
        new = [*new, 1]
    elif how == 4:
        new = []
    elif new:
        at = rng.randrange(len(new))
        new[at] = rng.choice([0, 1, new[at] + 1, max(0, new[at] - 1), new[at] * 2, new[at] // 2, 3, 7, 8, 24, 33, 96])
    count = 1
    for size in new:
        count *= size
    if count * BITS[dtype] > 8_000_000:
        return "reshape not done"
    folder.tensors[name] = (dtype, tuple(new), resize(content, count * BITS[dtype] // 8))
    return f"reshape {name} {list(shape)} to {new}"


def reshape_module(rng: random.Random, folder: Folder) -> str:
    """The same axis of every tensor of a module: sizes agree with each other, but are odd."""
    prefix = pick(rng, folder).rpartition(".")[0]
    members = [name for name in folder.tensors if name.startswith(prefix + ".")]
    sizes = [size for name in members for size in folder.tensors[name][1] if size > 1]
    if not sizes:
        return "reshape not done"
    old = rng.choice(sizes)
    factor, extra = rng.choice([(0, 0), (1, 1), (1, -1), (2, 0), (1, 8), (1, 4), (3, 0)])
    new = max(0, old * factor + extra)
    for name in members:
        dtype, shape, content = folder.tensors[name]
        changed = tuple(new if size == old else size for size in shape)
        count = 1
        for size in changed:
            count *= size
        if count * BITS[dtype] <= 8_000_000:
            folder.tensors[name] = (dtype, changed, resize(content, count * BITS[dtype] // 8))
    return f"{prefix}: size {old} to {new}"


def retype(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    dtype, shape, content = folder.tensors[name]
    new = rng.choice(DTYPES)
    count = 1
    for size in shape:
        count *= size
    folder.tensors[name] = (new, shape, resize(content, count * BITS[new] // 8))
    return f"retype {name} {dtype} to {new}"


def retype_all(rng: random.Random, folder: Folder) -> str:
    """Every tensor of one suffix, as when a tool saves in another dtype."""
    suffix = pick(rng, folder).rpartition(".")[2]
    new = rng.choice(["F16", "BF16", "F32", "F64", "I32", "I64", "U8", "I8", "F8_E8M0", "F8_E4M3"])
    for name, (_, shape, content) in folder.tensors.items():
        if name.endswith(f".{suffix}"):
            count = 1
            for size in shape:
                count *= size
            folder.tensors[name] = (new, shape, resize(content, count * BITS[new] // 8))
    return f"retype all {suffix} to {new}"


def flip_bits(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    dtype, shape, content = folder.tensors[name]
    if not content:
        return "nothing to flip"
    blob = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 50])):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    folder.tensors[name] = (dtype, shape, bytes(blob))
    return f"flip bits of {name}"


def fill(rng: random.Random, folder: Folder) -> str:
    name = pick(rng, folder)
    dtype, shape, content = folder.tensors[name]
    how = rng.choice(["00", "ff", "7f", "80", "88", "77", "random"])
    blob = rng.randbytes(len(content)) if how == "random" else bytes.fromhex(how) * len(content)
    folder.tensors[name] = (dtype, shape, blob)
    return f"fill {name} with {how}"


def entry(rng: random.Random, folder: Folder) -> str:
    """A header entry that lies about its bytes."""
    name = pick(rng, folder)
    key = rng.choice(["dtype", "shape", "data_offsets"])
    value: Any = odd(rng)
    if key != "dtype" and rng.random() < 0.7:
        value = [
            rng.choice([0, 1, 8, 100, -1, 2**31, 2**40, 2**62, 2**63, 2**64, True, 1.0, "1", None])
            for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 40]))
        ]
    folder.entries[name] = {key: value}
    return f"header of {name}: {key} = {value!r:.60}"


def change_at(rng: random.Random, value: Any, depth: int = 0) -> str:
    """Change one place in a JSON value, in place."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if isinstance(value[key], dict | list) and value[key] and depth < 6 and rng.random() < 0.75:
            return f"{key}." + change_at(rng, value[key], depth + 1)
        how = rng.random()
        if how < 0.2:
            del value[key]
            return f"{key} deleted"
        if how < 0.3:
            value[rng.choice(KEYS)] = value.pop(key)
            return f"{key} renamed"
        if how < 0.5:
            new = rng.choice(KEYS)
            value[new] = odd(rng)
            return f"{new} = {value[new]!r:.60}"
        value[key] = odd(rng)
        return f"{key} = {value[key]!r:.60}"
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        value[at] = odd(rng)
        return f"[{at}] = {value[at]!r:.60}"
    return "nothing to change"


def config(rng: random.Random, folder: Folder) -> str:
    place = folder.config
    if isinstance(place, dict) and isinstance(place.get("quantization_config"), dict) and rng.random() < 0.85:
        place = place["quantization_config"]
    return f"config: {change_at(rng, place)}"


def rules(rng: random.Random, folder: Folder) -> str:
    """Per-module rules, with patterns from strangers."""
    if not isinstance(folder.config, dict) or not isinstance(folder.config.get("quantization_config"), dict):
        return "no config to add rules to"
    quantization = folder.config["quantization_config"]
    module = pick(rng, folder).rpartition(".")[0]
    pattern = rng.choice(
        [
            module,
            f"+:{module}",
            f"re:{module}",
            ".*",
            "+:.*",
            "-:.*",
            "re:.*",
            "re:(.*)*x",
            "+:(a|aa)+$",
            "(.*a){50}",
            "(\\w+\\.)+x",
            "re:" + "(" * 500,
            "[",
            "*",
            "\\",
            "(?i)MODEL",
            "(?P<a>.)(?P=a)*x",
            "\ud800",
            "a" * 5000,
            re.sub(r"\d+", r"\\d+", module),
            "x*" * 40,
            f"re:.*{module.rpartition('.')[2]}$",
        ]
    )
    override = rng.choice(
        [
            {"bits": rng.choice([2, 3, 4, 8, 16, "4", None, -1])},
            {"group_size": 64},
            {"sym": False},
            {"data_type": "fp"},
            {},
            None,
            7,
            "x",
            [],
            False,
        ]
    )
    if rng.random() < 0.5:
        key = rng.choice(["dynamic", "extra_config"])
        quantization[key] = {pattern: override}
    else:
        key = "targets"
        groups = quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict):
                group["targets"] = rng.choice([[pattern], pattern, [pattern] * 3, [7], 7, {pattern: 1}])
    return f"{key}: {pattern[:60]!r}: {override!r}"


def top(rng: random.Random, folder: Folder) -> str:
    folder.config = rng.choice(
        [
            [],
            None,
            7,
            "x",
            {},
            {"quantization_config": odd(rng)},
            {"text_config": folder.config},
            {"compression_config": folder.config},
        ]
    )
    return "config.json replaced"


def other_config(rng: random.Random, folder: Folder) -> str:
    """A second quantization config beside config.json."""
    import json

    name = rng.choice(["quantize_config.json", "quant_config.json", "quantization_config.json"])
    value = load(rng.choice(fixtures())).config.get("quantization_config", {})
    change_at(rng, value)
    folder.files[name] = json.dumps(rng.choice([value, value, value, [], 7])).encode("utf-8", "surrogatepass")
    if rng.random() < 0.5 and isinstance(folder.config, dict):
        folder.config.pop("quantization_config", None)
    return f"{name} of another checkpoint"


def split(rng: random.Random, folder: Folder) -> str:
    folder.shards = rng.choice([2, 3, 10])
    return f"{folder.shards} shards"


def index(rng: random.Random, folder: Folder) -> str:
    folder.shards = rng.choice([1, 2, 3])
    seed = rng.random()

    def change(value: Any) -> Any:
        again = random.Random(seed)
        table = value["weight_map"]
        name = again.choice(list(table))
        where = [
            "../model.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "model.safetensors",
            "nowhere.safetensors",
            "",
            "config.json",
            "..",
            ".",
            "model-00001-of-00002.safetensors\x1b[2J",
            7,
            None,
            [],
            "\ud800.safetensors",
            "model-00002-of-00003.safetensors",
            "\\\\host\\share.safetensors",
        ]
        how = again.randrange(6)
        if how == 0:
            del table[name]
        elif how == 1:
            table[again.choice(["nothing.weight", "model.layers.0.x.qweight", "\x1b"])] = table[name]
        elif how == 2:
            value["weight_map"] = odd(again)
        elif how == 3:
            return odd(again)
        else:
            table[name] = again.choice(where)
        return value

    folder.index = change
    return f"index changed ({folder.shards} shards)"


def raw_header(rng: random.Random, folder: Folder) -> str:
    """Bytes of a shard's header."""
    seed = rng.random()

    def change(blob: bytes) -> bytes:
        again, changed = random.Random(seed), bytearray(blob)
        length = min(len(blob) - 8, int.from_bytes(blob[:8], "little"))
        if length < 0:
            return blob
        for _ in range(again.choice([1, 1, 2, 8])):
            at = again.randrange(8 + length) if again.random() < 0.9 else again.randrange(8)
            changed[at] = again.choice([changed[at] ^ (1 << again.randrange(8)), again.randrange(256), *b'",:{}[]0-9'])
        return bytes(changed)

    folder.blobs.append((_a_shard(rng, folder), change))
    return "header bytes changed"


def cut(rng: random.Random, folder: Folder) -> str:
    share = rng.choice([0.0, 1e-5, 0.001, 0.05, 0.5, 0.99, 0.9999, 2.0])
    extra = rng.choice([b"", b"\0", b"x" * 100])

    def change(blob: bytes) -> bytes:
        return blob[: int(len(blob) * share)] + extra

    folder.blobs.append((rng.choice([_a_shard(rng, folder), "config.json"]), change))
    return f"file cut to {share} of its length, {len(extra)} bytes added"


def raw_json(rng: random.Random, folder: Folder) -> str:
    seed = rng.random()

    def change(blob: bytes) -> bytes:
        again, changed = random.Random(seed), bytearray(blob)
        for _ in range(again.choice([1, 2, 5])):
            if not changed:
                break
            at = again.randrange(len(changed))
            how = again.randrange(4)
            if how == 0:
                del changed[at : at + again.choice([1, 5, 50])]
            elif how == 1:
                changed[at:at] = again.choice(
                    [
                        b"\xff",
                        b"\0",
                        b"[" * 5000,
                        b"NaN",
                        b"1e999",
                        b'"',
                        b"\xef\xbb\xbf",
                        b'{"a":' * 200,
                        b"-",
                        b"\\ud800",
                        b"/*",
                    ]
                )
            else:
                changed[at] ^= 1 << again.randrange(8)
        return bytes(changed)

    folder.blobs.append((rng.choice(["config.json", "config.json", "model.safetensors.index.json"]), change))
    return "bytes of a JSON file changed"


def files(rng: random.Random, folder: Folder) -> str:
    """Other files, with names that something else might want."""
    name = rng.choice(
        [
            "journal.jsonl",
            "lock",
            "config.json.new",
            ".xpuquant/journal.jsonl",
            "README.md",
            "verify.json",
            "a/b/c/d",
            "xpuquant.json",
            "pytorch_model.bin",
            "modeling_x.py",
            "tokenizer.json",
            "model-00001-of-00001.safetensors",
            "files/x",
            "é.txt",
            "x\x1b[2J.txt",
            "adapter_model.safetensors",
            "-rf",
            "chat_template.jinja",
            "model.gguf",
        ]
    )
    folder.files[name] = rng.choice([b"", b"{}", b"\xff" * 100, b'{"plan": "x"}\n'])
    return f"file {name!r}"


def _a_shard(rng: random.Random, folder: Folder) -> str:
    count = max(1, min(folder.shards, len(folder.tensors)))
    return "model.safetensors" if count == 1 else f"model-{rng.randint(1, count):05}-of-{count:05}.safetensors"


MUTATIONS: dict[Mutation, int] = {
    drop_tensor: 3,
    drop_module: 2,
    rename: 5,
    copy_tensor: 3,
    graft: 4,
    graft_config: 3,
    reshape: 7,
    reshape_module: 7,
    retype: 5,
    retype_all: 4,
    flip_bits: 5,
    fill: 5,
    entry: 4,
    config: 14,
    rules: 5,
    top: 1,
    other_config: 3,
    split: 4,
    index: 4,
    raw_header: 5,
    cut: 3,
    raw_json: 3,
    files: 3,
}
"""Mutation → weight."""


def mutate(rng: random.Random, folder: Folder, count: int) -> None:
    """Apply `count` mutations."""
    for mutation in rng.choices(list(MUTATIONS), list(MUTATIONS.values()), k=count):
        if folder.tensors:
            folder.edits.append(f"{mutation.__name__}: {mutation(rng, folder)}")
