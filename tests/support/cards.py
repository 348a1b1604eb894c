"""What the card of a conversion may say: one, and a later one of the same repo."""

from dataclasses import replace

from xpuquant.conversion.repo.card import CardFacts, SchemeCount, VerificationSummary

FACTS = CardFacts(
    name="Qwen3-30B-xpu",
    base_model="Qwen/Qwen3-30B-A3B-GPTQ-Int4",
    revision="0123456789abcdef",
    command="xpuquant convert Qwen/Qwen3-30B-A3B-GPTQ-Int4 --push-to me/Qwen3-30B-xpu",
    versions={"xpuquant": "0.1.0", "numpy": "2.0"},
    schemes=[SchemeCount("gptq int4", "int4_linear g128", "int4", 96, 12_000_000_000)],
    left=[("lm_head", "not quantized in the source")],
    source_bytes=17_000_000_000,
    bytes=16_900_000_000,
    shards=4,
    verification=VerificationSummary(["96 matrices decode exactly to the source"], "verify.svg", "verify.json"),
    source_metadata={
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "4-bit", "chat"],
        "base_model": "Qwen/Qwen3-30B-A3B",
    },
)

NEWER = replace(FACTS, command="xpuquant convert --scale-dtype bf16 ...")
