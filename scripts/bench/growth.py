"""Does the cost per byte grow with the number of layers, the cost per tensor with the number of tensors?

    python scripts/bench/growth.py [--rounds 3] [--folder DIR] [--svg docs/growth.svg] [--layers 64] [--tensors 100000]

Two series of GPTQ checkpoints are converted, with and without verification, as whole processes: Llama-3.2-1B layers,
from 1 to 64; and expert layers of matrices so small that only their number costs, from 1,000 tensors to 100,000. The
figure is a ratio of slopes: what a byte (a tensor) more costs in the upper part of the range, over what it costs in the
lower part. Start-up cancels out; a cost that is linear gives 1, a quadratic term shows as 4 or 10. Exits 1 when one
is above the goal. The plot has the cost per byte and per tensor at each size, less that of the smallest conversion.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from bench.measure import Line, Run, Table, apart, fresh, median, peak_line, timed, warm, xpuquant
from support.real_shapes import Model, entries, write_checkpoint

GOAL = 1.5
"""Between linear (1) and quadratic (4 for the layers, 10 for the tensors), with room for caches and a noisy disk."""

LAYERS = (1, 4, 16, 64)
TENSORS = (1_000, 3_000, 10_000, 30_000, 100_000)
_EXPERTS = 64
_QUICK_SECONDS = 2.0

MODES = {"verified": (), "--no-verify": ("--no-verify",)}


@dataclass(frozen=True)
class Point:
    """Median wall seconds per mode at one size, in layers or tensors; `amount` is the bytes, or again the tensors.

    cpu  median processor seconds per mode
    """

    size: int
    amount: int
    seconds: Mapping[str, float]
    cpu: Mapping[str, float]


@dataclass(frozen=True)
class Growth:
    """Both series, smallest first; `start` is what a conversion of next to nothing takes, per mode."""

    layers: Sequence[Point]
    tensors: Sequence[Point]
    start: Mapping[str, float]
    lines: Sequence[Line]


def small_tensors(layers: int) -> Model:
    """64 experts a layer, matrices of 128 × 128: 773 tensors and 1.8 MB a layer."""
    return Model(0, layers, _EXPERTS, hidden=128, moe_hidden=128, moe_intermediate=128, vocab=64)


def large_layers(layers: int) -> Model:
    """Layers of Llama-3.2-1B, 31 MB each."""
    return Model(layers, 0, hidden=2048, intermediate=8192, vocab=512)


def count(model: Model) -> int:
    """Tensors of its GPTQ checkpoint."""
    return sum(1 for _ in entries("gptq", model))


def measure(folder: Path, rounds: int, layers: Sequence[int] = LAYERS, tensors: Sequence[int] = TENSORS) -> Growth:
    """Run both series in a scratch folder."""
    each = count(small_tensors(2)) - count(small_tensors(1))
    start, _ = _convert(folder, small_tensors(1), rounds)
    many = [small_tensors(max(1, round(n / each))) for n in tensors]
    by_layers, layer_runs = _series(folder, {n: large_layers(n) for n in layers}, rounds, by_bytes=True)
    by_tensors, tensor_runs = _series(folder, {count(model): model for model in many}, rounds)
    lines = []
    for what, unit, points in (("byte", "layers", by_layers), ("tensor", "tensors", by_tensors)):
        for mode in MODES:
            name = f"time per {what}, {points[0].size:,} to {points[-1].size:,} {unit}, {mode}"
            amounts = [point.amount for point in points]
            wall, cpu = [point.seconds[mode] for point in points], [point.cpu[mode] for point in points]
            detail = ", ".join(f"{seconds:.2f}" for seconds in wall) + " s; processor time "
            detail += f"{_slopes(amounts, cpu):.2f} × linear"
            lines.append(Line(name, _slopes(amounts, wall), "× linear", GOAL, detail))
    lines.append(peak_line(f"peak memory, {by_layers[-1].size} layers", layer_runs))
    lines.append(peak_line(f"peak memory, {by_tensors[-1].size:,} tensors", tensor_runs))
    return Growth(by_layers, by_tensors, {mode: median(made) for mode, made in start.items()}, lines)


def _series(
    folder: Path, models: Mapping[int, Model], rounds: int, by_bytes: bool = False
) -> tuple[list[Point], list[Run]]:
    """Points of all sizes, and the runs of the largest."""
    points: list[Point] = []
    last: list[Run] = []
    for size, model in models.items():
        runs, nbytes = _convert(folder, model, rounds)
        seconds = {mode: median(made) for mode, made in runs.items()}
        cpu = {mode: statistics.median(run.cpu for run in made) for mode, made in runs.items()}
        points.append(Point(size, nbytes if by_bytes else size, seconds, cpu))
        last = [run for made in runs.values() for run in made]
    return points, last


def _convert(folder: Path, model: Model, rounds: int) -> tuple[dict[str, list[Run]], int]:
    """Runs per mode, and the bytes of the source. Short runs are repeated more often: they are small differences."""
    source, out = folder / "source", folder / "out"
    nbytes = apart(write_checkpoint, source, "gptq", model)
    warm(source)
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    turns = rounds
    while turns:
        turns -= 1
        for mode, options in MODES.items():
            fresh(out)
            runs[mode].append(timed(xpuquant("convert", source, out, *options)))
        if len(runs["verified"]) == 1 and runs["verified"][0].wall < _QUICK_SECONDS:
            turns = 3 * rounds
    shutil.rmtree(source)
    shutil.rmtree(out)
    return runs, nbytes


def _slopes(amounts: Sequence[int], costs: Sequence[float]) -> float:
    """Cost of one more in the upper part of the range, over that in the lower part."""
    middle = len(amounts) // 2
    upper = (costs[-1] - costs[middle]) / (amounts[-1] - amounts[middle])
    lower = (costs[middle] - costs[0]) / (amounts[middle] - amounts[0])
    return upper / lower if lower > 0 else math.inf


_STYLE = """
.g text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#24292f}
.g .soft{fill:#57606a}
.g .grid{stroke:#d0d7de;stroke-width:1}
.g .line{fill:none;stroke-width:2}
.g .a{stroke:#0969da}.g .b{stroke:#bc4c00}
.g circle.a{fill:#0969da}.g circle.b{fill:#bc4c00}
@media(prefers-color-scheme:dark){.g text{fill:#e6edf3}.g .soft{fill:#9da7b3}.g .grid{stroke:#30363d}
.g .a{stroke:#58a6ff}.g .b{stroke:#f0883e}.g circle.a{fill:#58a6ff}.g circle.b{fill:#f0883e}}
"""
_PANEL = (360.0, 180.0)
_MARGIN = (52.0, 46.0, 52.0)
"""Left, top, bottom."""


def plot(growth: Growth) -> str:
    """Both series as a complete SVG, one panel each."""
    panels = (
        ("Seconds per GB", "layers", growth.layers, 1e9),
        ("Microseconds per tensor", "tensors", growth.tensors, 1e6),
    )
    width = 2 * (_PANEL[0] + _MARGIN[0]) + 24
    height = _PANEL[1] + _MARGIN[1] + _MARGIN[2]
    parts = [
        f'<svg class="g" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="Cost per byte and per tensor against size">',
        f"<style>{_STYLE}</style>",
    ]
    for i, (title, unit, points, scale) in enumerate(panels):
        left = _MARGIN[0] + i * (_PANEL[0] + _MARGIN[0] + 12)
        series = {
            mode: [scale * max(0.0, p.seconds[mode] - growth.start[mode]) / p.amount for p in points] for mode in MODES
        }
        parts += _panel(left, title, unit, [p.size for p in points], series)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    left: float, title: str, unit: str, sizes: Sequence[int], series: Mapping[str, Sequence[float]]
) -> list[str]:
    width, height = _PANEL
    top, bottom = _MARGIN[1], _MARGIN[1] + height
    step = _round_up(max(max(values) for values in series.values()) / 4)
    ticks = [step * n for n in range(5)]
    lowest, highest = math.log(sizes[0]), math.log(sizes[-1])

    def x(size: int) -> float:
        return left + width * (math.log(size) - lowest) / ((highest - lowest) or 1)

    def y(value: float) -> float:
        return bottom - height * value / ticks[-1]

    parts = [f'<text x="{left:.0f}" y="14">{title}, less the start-up</text>']
    for value in ticks:
        at = y(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}h{width:.1f}"/>')
        parts.append(f'<text class="soft" x="{left - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for size in sizes:
        shown = f"{size / 1000:.0f}k" if size >= 10_000 else f"{size:,}"
        parts.append(f'<text class="soft" x="{x(size):.1f}" y="{bottom + 18}" text-anchor="middle">{shown}</text>')
    parts.append(f'<text class="soft" x="{left + width / 2:.1f}" y="{bottom + 38}" text-anchor="middle">{unit}</text>')
    for n, (mode, values) in enumerate(series.items()):
        kind = "ab"[n]
        points = [(x(size), y(value)) for size, value in zip(sizes, values, strict=True)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
        parts += [
            f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"><title>{mode}, {size:,} {unit}: {value:.3g}'
            "</title></circle>"
            for (a, b), size, value in zip(points, sizes, values, strict=True)
        ]
        at = left + 110 * n
        parts.append(f'<path class="line {kind}" d="M{at:.0f} {top - 18}h18"/>')
        parts.append(f'<text class="soft" x="{at + 24:.0f}" y="{top - 14}">{mode}</text>')
    return parts


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="scratch space (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=LAYERS[-1], help="the largest number of layers")
    parser.add_argument("--tensors", type=int, default=TENSORS[-1], help="the largest number of tensors")
    parser.add_argument("--svg", type=Path, help="write the plot here")
    arguments = parser.parse_args()
    layers = [n for n in LAYERS if n < arguments.layers] + [arguments.layers]
    tensors = [n for n in TENSORS if n < arguments.tensors] + [arguments.tensors]
    if min(len(layers), len(tensors)) < 3:
        parser.error("two slopes need three sizes: at least --layers 5 and --tensors 3001")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        table = Table(Path(scratch), arguments.rounds)
        growth = measure(Path(scratch), arguments.rounds, layers, tensors)
        table.add(growth.lines)
    if arguments.svg:
        arguments.svg.write_text(plot(growth))
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
