"""How fast conversions were, measured: what `inspect` promises a model of the same format."""

from __future__ import annotations

VERIFIED = {
    "gptq": 0.39e9,
    "autoround": 0.39e9,
    "awq": 0.34e9,
    "compressed-tensors": 0.45e9,
    "fp8": 0.41e9,
    "mxfp4": 0.5e9,
    "mxfp8": 0.49e9,
}
"""Format, by its first word → bytes of the source per second, converted and verified on two cores, start-up included:
docs/performance.md, "Every goal"."""

SLOWEST = min(VERIFIED.values())


START_SECONDS = 1.0
"""To start, plan and write the reports, and to load the kernels, on a quiet machine, whatever the size of the model:
half a second each in the table of docs/performance.md, "More cores". It is all that a small model takes."""


def seconds(nbytes: int, formats: tuple[str, ...]) -> float:
    """Seconds that converting and verifying a source of so many bytes takes: the start, and the rest at the rate of its
    slowest format."""
    rates = [VERIFIED.get(name.split()[0], SLOWEST) for name in formats] or [SLOWEST]
    return START_SECONDS + nbytes / min(rates)
