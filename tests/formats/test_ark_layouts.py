"""Experts that vllm-xpu-kernels does not take, as ARK's kernels read them: zero points, and more than 4 bits."""

from __future__ import annotations

import numpy as np
import pytest
from support.ints import (
    Ints,
    Pico,
    awq,
    awq_config,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

STACK = "model.layers.0.mlp.experts"
ROLES = ("gate", "up", "down")
E, I, H = 2, 32, 64


def experts(bits: tuple[int, int, int], symmetric: tuple[bool, bool, bool], group: int = 32, **more) -> dict[str, Ints]:
    """Two experts; bits and symmetry of gate, up, down."""
    made = {}
    for expert in range(E):
        for i, role in enumerate(ROLES):
            N, K = (H, I) if role == "down" else (I, H)
            seed = 10 * expert + i
            made[f"{STACK}.{expert}.{role}_proj"] = ints(
                bits[i], N, K, group, symmetric=symmetric[i], seed=seed, **more
            )
    return made


def check(out, made):
    for name, weight in made.items():
        expert, part = name.removeprefix(f"{STACK}.").split(".")
        assert np.array_equal(out.values(STACK, part.removesuffix("_proj"), int(expert)), weight.values)


def converted(tmp_path, config, tensors, **options):
    return convert(Pico(config, tensors).write(tmp_path / "in"), tmp_path / "out", **options)


def test_asymmetric_experts_are_the_bytes_of_the_contract(tmp_path):
    """uint8 `[E, N, K/2]`, low nibble the even column, unsigned; zero points a byte each, `[E, N, K/g]`."""
    made = experts((4, 4, 4), (False, False, False))
    out = converted(tmp_path, awq_config(), {name: awq(weight) for name, weight in made.items()})
    check(out, made)
    for part, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        members = [[made[f"{STACK}.{e}.{role}_proj"] for role in roles] for e in range(E)]
        codes = np.array([np.concatenate([w.codes for w in each]) for each in members])
        zeros = np.array([np.concatenate([w.zeros.T for w in each]) for each in members])
        scales = np.array([np.concatenate([w.scales.T for w in each]) for each in members])
        assert np.array_equal(out.array(f"{STACK}.{part}"), codes[..., 0::2] | codes[..., 1::2] << 4)
        assert np.array_equal(out.array(f"{STACK}.{part}_zero_point"), zeros)
        assert np.array_equal(out.array(f"{STACK}.{part}_scale"), scales)
    scheme = out.repo.modules[STACK].scheme
    assert (scheme.layout, scheme.group_size, scheme.symmetric) == ("uint4_experts", 32, False)
    assert out.plan.quantization_config("tests")["format_version"] == 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_8_bit_experts_are_the_bytes_of_the_contract(tmp_path, symmetric):
    """int8 `[E, N, K]` where symmetric; otherwise uint8 and zero points."""
    made = experts((8, 8, 8), (symmetric,) * 3)
    out = converted(tmp_path, gptq_config(bits=8), {name: gptq(weight) for name, weight in made.items()})
    check(out, made)
    stored = out.array(f"{STACK}.down_proj")
    codes = np.array([made[f"{STACK}.{e}.down_proj"].codes for e in range(E)])
    assert stored.dtype == (np.int8 if symmetric else np.uint8)
    assert np.array_equal(stored, codes.astype(np.int16) - 128 if symmetric else codes)
    assert (f"{STACK}.down_proj_zero_point" in out.repo.tensors) != symmetric
    assert out.repo.modules[STACK].scheme.layout == "int8_experts"


PACK = {
    "gptq": (gptq_config(), gptq),
    "awq": (awq_config(), awq),
    "packed": (None, lambda weight: pack_quantized(weight)),
    "bytes": (None, lambda weight: unpacked(weight, zeros=True)),
}
MIXES = [
    # bits, which are symmetric, the layout, and whether it needs zero points
    ((4, 4, 4), (True, True, True), "int4_experts", False),
    ((4, 4, 4), (True, True, False), "uint4_experts", True),
    ((4, 3, 2), (False, False, False), "uint4_experts", True),
    ((2, 3, 3), (False, False, False), "int4_experts", False),
    ((4, 4, 8), (True, True, True), "int8_experts", False),
    ((4, 4, 8), (False, False, True), "int8_experts", False),
    ((4, 2, 8), (False, False, False), "int8_experts", True),
    ((5, 6, 7), (False, False, False), "int8_experts", False),
    ((8, 8, 8), (True, True, False), "int8_experts", True),
]


@pytest.mark.parametrize(("bits", "symmetric", "layout", "zeros"), MIXES)
@pytest.mark.parametrize("source", PACK)
def test_every_mix_is_exact(tmp_path, source, bits, symmetric, layout, zeros):
    """Code minus zero point of fewer than 8 bits is a signed byte, of fewer than 4 a signed nibble."""
    if source == "awq" and bits != (4, 4, 4):
        return
    config, pack = PACK[source]
    if config is None:
        config = ct_config(symmetric=False)
        config["config_groups"] = {
            f"group_{i}": {
                "targets": [f"re:.*{role}_proj$"],
                "weights": {**config["config_groups"]["group_0"]["weights"], "num_bits": bits[i]},
            }
            for i, role in enumerate(ROLES)
        }
    made = experts(bits, symmetric)
    out = converted(tmp_path, config, {name: pack(weight) for name, weight in made.items()})
    check(out, made)
    scheme = out.repo.modules[STACK].scheme
    assert (scheme.layout, scheme.symmetric) == (layout, not zeros)
    assert out.plan.format_version == (1 if layout == "int4_experts" else 2)


@pytest.mark.parametrize(("bits", "symmetric"), [((4, 4, 4), (False,) * 3), ((8, 8, 8), (True,) * 3)])
def test_one_group_of_k_becomes_groups_that_both_matrices_have(tmp_path, bits, symmetric):
    made = experts(bits, symmetric, group=64)
    tensors = {name: pack_quantized(weight) for name, weight in made.items()}
    out = converted(tmp_path, ct_config(bits[0], None, symmetric=symmetric[0]), tensors)
    check(out, made)
    assert out.repo.modules[STACK].scheme.group_size == 32  # down has K = 32


def test_scales_are_rounded_only_where_that_is_asked_for(tmp_path):
    made = experts((4, 4, 4), (False,) * 3)
    out = converted(tmp_path, awq_config(), {n: awq(w) for n, w in made.items()}, scale_dtype="BF16")
    assert out.repo.tensors[f"{STACK}.down_proj_scale"].dtype == "BF16"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act_order": True}, "act-order experts have no XPU kernel (no expert kernel has a g_idx)"),
        ({"group": 8}, "no group size of [128, 64, 32, 16] divides the groups of all experts"),
    ],
)
def test_what_arks_kernels_lack_is_refused(tmp_path, change, reason):
    made = experts((4, 4, 4), (False,) * 3, **{"group": 32, **change})
    config = gptq_config(sym=False, group_size=change.get("group", 32))
    assert reason in refusal(tmp_path, Pico(config, {name: gptq(weight) for name, weight in made.items()}))


def test_sizes_that_arks_kernels_do_not_take_are_refused(tmp_path):
    shape = {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}
    made = {f"{STACK}.0.{role}_proj": ints(4, *shape[role], 16, symmetric=False) for role in ROLES}
    tensors = {name: awq(weight) for name, weight in made.items()}
    message = refusal(tmp_path, Pico(awq_config(group_size=16), tensors))
    assert "gate is [48, 64]; ARK's expert kernels are given multiples of 32: model.layers.0.mlp.experts" in message


def test_biases_of_asymmetric_experts_are_refused(tmp_path):
    made = experts((4, 4, 4), (False,) * 3)
    biases = {f"{name}.bias": np.ones(weight.N, np.float16) for name, weight in made.items()}
    checkpoint = Pico(awq_config(), {name: awq(weight) for name, weight in made.items()}, biases)
    assert "ARK's expert kernels add no bias" in refusal(tmp_path, checkpoint)
