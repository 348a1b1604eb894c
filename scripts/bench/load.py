"""Load cost: the source through stock vLLM's own code for Intel GPUs, and the converted repo through the plugin.

    scripts/lanes/vllm --env-only && .venv-vllm/bin/python scripts/bench/load.py [--layers N] [--repeat R] [DIR]

Writes GPTQ checkpoints with the shapes of real models (random words: the work does not depend on values),
converts them, and loads source and result through vLLM's model loader, each in a process of its own, in
turns, files in the page cache. Exits with 1 where a goal is missed.

The clock starts when vLLM's loader is told to open the files, and stops when every parameter is as the kernel
reads it at the second forward: reading, the model's `load_weights`, `process_weights_after_loading`, and what
the first forward converts (`implement_zp`; nothing for the plugin). Before it, and the same on both sides:
imports, and building the model without its weights. "cpu" is the processor time of all threads in that span,
which other programs disturb less than the seconds.

There is no GPU in it: stock vLLM's XPU classes run on CPU tensors, told that the platform is XPU. On either side
layers that are not quantized are left alone, as on XPU; vLLM's CPU backend would pack them. Memory is the
process's own (RssAnon, sampled every 2 ms, counted from before the model is built): mapped files are not counted
on either side. A byte of every page of the parameters is read before the clock stops. vLLM's two garbage
collections per load, which cost the same on both sides and depend on the process rather than the model, are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench.stock_xpu import become_stock_xpu

GROUP = 128
FASTER = 5.0  # goal: how many times, in seconds; the other goal is a peak of no more than the parameters
KERNELS = "vllm-xpu-kernels==0.1.16.2"
COMMON = {
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "dense (Llama-3.1-8B)": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "experts (Qwen3-30B-A3B)": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def linears(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of every quantized linear."""
    H, D = config["hidden_size"], config["head_dim"]
    Q, KV = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, N, K in (("q_proj", Q, H), ("k_proj", KV, H), ("v_proj", KV, H), ("o_proj", H, Q)):
            yield f"{prefix}.self_attn.{name}", N, K
        I = config.get("moe_intermediate_size", config["intermediate_size"])
        experts = [f"experts.{e}." for e in range(config["num_experts"])] if "num_experts" in config else [""]
        for expert in experts:
            for name, N, K in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
                yield f"{prefix}.mlp.{expert}{name}", N, K


def write_source(folder: Path, config: dict[str, Any]) -> None:
    """A GPTQ checkpoint of `config`, one safetensors file per layer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    H, D = config["hidden_size"], config["head_dim"]
    shards: dict[str, dict[str, torch.Tensor]] = {"model-head.safetensors": {}}
    head = shards["model-head.safetensors"]
    for name in ("model.embed_tokens", "lm_head"):
        head[f"{name}.weight"] = torch.randn(config["vocab_size"], H).bfloat16()
    head["model.norm.weight"] = torch.ones(H, dtype=torch.bfloat16)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shard = shards.setdefault(f"model-{layer:05d}.safetensors", {})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}.{norm}.weight"] = torch.ones(H, dtype=torch.bfloat16)
        if "num_experts" in config:
            shard[f"{prefix}.mlp.gate.weight"] = torch.randn(config["num_experts"], H).bfloat16()
            for norm in ("q_norm", "k_norm"):
                shard[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(D, dtype=torch.bfloat16)
    for name, N, K in linears(config):
        shard = shards[f"model-{int(name.split('.')[2]):05d}.safetensors"]
        shard[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (K // 8, N), dtype=torch.int32)
        shard[f"{name}.scales"] = torch.rand(K // GROUP, N).bfloat16()
        shard[f"{name}.qzeros"] = torch.full((K // GROUP, N // 8), 0x77777777, dtype=torch.int32)
        shard[f"{name}.g_idx"] = torch.arange(K, dtype=torch.int32) // GROUP
    index = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**quantization, "checkpoint_format": "gptq"}})
    )


def first_forward(model: Any, stock: bool) -> None:
    """What the first forward prepares in every stack of experts."""
    for layer in model.modules():
        if type(layer).__name__ != "RoutedExperts":
            continue
        if not stock:
            from xpuquant.xpu_ops import fused_moe

            method = layer.quant_method
            method.kernel = fused_moe(method.scheme, dict(layer.named_parameters()), 8, "silu")
            continue
        from vllm_xpu_kernels.fused_moe_interface import XpuFusedMoe

        XpuFusedMoe(
            w13=layer.w13_weight,
            w13_scales=layer.w13_scales,
            w13_bias=None,
            w2=layer.w2_weight,
            w2_scales=layer.w2_scales,
            w2_bias=None,
            n_experts_per_token=8,
            activation="silu",
            num_experts=layer.local_num_experts,
        )


def touch(model: Any) -> None:
    """Read a byte of every page of the parameters, as a forward would: some may only be mapped so far."""
    import torch

    for param in model.parameters():
        held = param.data.untyped_storage()
        begin = param.data.storage_offset() * param.itemsize
        torch.tensor([], dtype=torch.uint8).set_(held)[begin : begin + param.nbytes : 4096].sum()


def anonymous() -> int:
    """Bytes of memory that is the process's own, not a mapped file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def measure(folder: Path, wheel: Path, stock: bool) -> dict[str, float]:
    """In a child: seconds, processor seconds, peak and parameter bytes of one load."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from support.plugin_loading import load
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    # The plugin's side needs XpuFusedMoe only; it chooses nothing by platform here.
    become_stock_xpu(wheel)
    gc.collect = lambda *_: 0
    peak = baseline = 0
    started = cpu = 0.0
    done = threading.Event()
    load_weights = DefaultModelLoader.load_weights

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)

    def before() -> None:
        nonlocal baseline
        baseline = anonymous()
        watcher.start()

    def opening(*args: Any) -> None:
        nonlocal started, cpu
        started, cpu = time.perf_counter(), time.process_time()
        load_weights(*args)

    DefaultModelLoader.load_weights = opening
    model = load(folder, before=before)
    first_forward(model, stock)
    touch(model)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    watcher.join()
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return {"seconds": seconds, "cpu": cpu, "peak": peak - baseline, "parameters": sum(held.values())}


def run(folder: Path, wheel: Path, side: str) -> dict[str, float]:
    """`measure` in a child process."""
    command = [sys.executable, __file__, "--child", side, "--wheel", str(wheel), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"{side} of {folder} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(lines[0].removeprefix("MEASURED "))
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path, help="where models are made and kept (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--child", choices=("stock", "converted"), help=argparse.SUPPRESS)
    parser.add_argument("--wheel", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("MEASURED " + json.dumps(measure(args.dir, args.wheel, args.child == "stock")), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        met = bench(args.dir or Path(temporary), args.layers, args.repeat)
    return 0 if met else 1


def bench(root: Path, layers: int, repeat: int) -> bool:
    """Print the table and the goals; whether all are met."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    if not list(root.glob("vllm_xpu_kernels*.whl")):
        subprocess.run([*pip, "--only-binary", ":all:", "-d", str(root), KERNELS], check=True)
    wheel = next(root.glob("vllm_xpu_kernels*.whl"))
    print(f"{layers} layers, median of {repeat}; {os.cpu_count()} cores, no GPU\n")
    print("| model | side | seconds | cpu | peak MB | parameters MB | peak / parameters |")
    print("|---|---|---|---|---|---|---|")
    goals: list[tuple[str, bool]] = []
    for title, config in CASES.items():
        folder = root / f"{config['model_type']}-{layers}"
        if not (folder / "converted" / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_source(folder / "source", {**COMMON, **config, "num_hidden_layers": layers})
            convert = ["convert", str(folder / "source"), str(folder / "converted"), "--no-verify"]
            subprocess.run([sys.executable, "-m", "xpuquant", *convert], check=True, stdout=subprocess.DEVNULL)
        sides = {"stock": folder / "source", "converted": folder / "converted"}
        results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(repeat):
            for side, where in sides.items():
                for file in where.glob("*.safetensors"):
                    file.read_bytes()
                results[side].append(run(where, wheel, side))
        median = {
            side: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for side, runs in results.items()
        }
        for side, r in median.items():
            row = f"{r['seconds']:.2f} | {r['cpu']:.2f} | {r['peak'] / 1e6:.0f} | {r['parameters'] / 1e6:.0f}"
            print(f"| {title} | {side} | {row} | {r['peak'] / r['parameters']:.2f} |", flush=True)
        stock, ours = median["stock"], median["converted"]
        faster = stock["seconds"] / ours["seconds"]
        goals += [
            (
                f"{title}: {faster:.1f} times faster ({stock['cpu'] / ours['cpu']:.1f} times less processor "
                f"time); goal: {FASTER:.0f} times",
                faster >= FASTER,
            ),
            (
                f"{title}: the peak is {ours['peak'] / 1e6:.0f} MB; goal: the parameters, "
                f"{ours['parameters'] / 1e6:.0f} MB",
                ours["peak"] <= ours["parameters"],
            ),
        ]
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    print(f"\nload average at the end: {load} (these loads included)\n")
    for goal, met in goals:
        print(f"{'ok' if met else 'MISSED'}: {goal}")
    return all(met for _, met in goals)


if __name__ == "__main__":
    sys.exit(main())
