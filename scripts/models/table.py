"""docs/models.md: what becomes of the models that people run, planned at full size from headers alone.

    scripts/lanes/models [WORD...]     all, and docs/models.md is rewritten; or those whose names have one of the words

Each checkpoint is written without weights (`headers.py`), planned in a process of its own and deleted: seconds of
processor time and the process's largest resident memory are of opening the folder and planning it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.measure import insert
from models.catalogue import PUBLISHED, Published
from models.headers import write
from models.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
RANKS = (1, 2, 4, 8)
SECONDS, BYTES = 30, 2 << 30
"""What planning the largest may take."""


@dataclass(frozen=True)
class Row:
    """A plan in numbers.

    refused  why it does not convert; empty where it does
    kernels  of its modules
    per_gpu  number of GPUs → bytes of weights on each; None where a linear does not split
    expert_parallel  numbers of GPUs for which stacks of experts are split by expert
    """

    source: int
    refused: list[str]
    kernels: list[str]
    output: int
    shards: int
    per_gpu: dict[str, int | None]
    why: dict[str, str]
    expert_parallel: list[int]
    seconds: float
    memory: int


def planned(folder: Path) -> Row:
    """Plan a folder, here."""
    began = time.process_time()
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.plan.footprint import weights_on_each
    from xpuquant.conversion.plan.plan import make_plan
    from xpuquant.conversion.plan.survey import survey_modules
    from xpuquant.conversion.plan.tensor_parallel import problems
    from xpuquant.conversion.results import summary
    from xpuquant.conversion.sources.open import open_source
    from xpuquant.errors import UnsupportedError
    from xpuquant.formats.layouts.modules import ExpertStack

    source = open_source(str(folder))
    try:
        plan = make_plan(source.checkpoint, Options())
    except UnsupportedError as error:
        seconds = time.process_time() - began
        refused = survey_modules(source.checkpoint, Options()).refused
        reasons = sorted(set(refused.values())) or [str(error)]
        return Row(source.nbytes, reasons, [], 0, 0, {}, {}, [], seconds, _peak())
    seconds = time.process_time() - began
    per_gpu: dict[str, int | None] = {}
    why: dict[str, str] = {}
    by_expert = []
    for ranks in RANKS:
        found = problems(plan.modules, ranks) if ranks > 1 else {}
        stacks = {m.conversion.name: m.source for m in plan.modules if isinstance(m.source, ExpertStack)}
        rest = {name: problem for name, problem in found.items() if name not in stacks}
        rest |= {name: found[name] for name, stack in stacks.items() if name in found and stack.experts % ranks}
        if rest:
            name, problem = next(iter(rest.items()))
            per_gpu[str(ranks)], why[str(ranks)] = None, f"{name.rpartition('.')[2]}: {problem}"
            continue
        if found:
            by_expert.append(ranks)
        per_gpu[str(ranks)] = weights_on_each(plan.modules, plan.passed, source.checkpoint.text_config, ranks)
    kernels = sorted({m.kernel for m in summary(plan, source).modules if m.kernel})
    return Row(
        source.nbytes, [], kernels, plan.write_bytes, len(plan.shards), per_gpu, why, by_expert, seconds, _peak()
    )


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def rows(wanted: Sequence[str], kept: Path | None) -> Iterator[tuple[Published, Row]]:
    """Every plan, each in a process of its own, but for those that an earlier run left in `kept`."""
    before = {} if kept is None or not kept.exists() else dict(map(json.loads, kept.read_text().splitlines()))
    for published in PUBLISHED:
        name = f"{published.model.name} {published.scheme}".lower()
        if wanted and not any(word.lower() in name for word in wanted):
            continue
        if name in before:
            yield published, Row(**before[name])
            continue
        with tempfile.TemporaryDirectory(prefix="xpuquant-headers-") as folder:
            write(Path(folder), published)
            command = [sys.executable, __file__, "--plan", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{published.model.name}, {published.scheme}: {done.stderr[-2000:]}")
        row = Row(**json.loads(done.stdout))
        if kept is not None:
            with kept.open("a") as file:
                file.write(json.dumps([name, asdict(row)]) + "\n")
        print(
            f"{published.model.name}, {SCHEMES[published.scheme].label}: {_converts(row)}, {row.seconds:.1f} s",
            flush=True,
        )
        yield published, row


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f}" if size >= 99.5e9 else f"{size / 1e9:.1f}"


def _converts(row: Row) -> str:
    return "no" if row.refused else "yes"


def _cell(row: Row, ranks: int) -> str:
    if row.refused:
        return "–"
    size = row.per_gpu[str(ranks)]
    return "no" if size is None else f"{_gb(size)}{' ᴱ' if ranks in row.expert_parallel else ''}"


def page(found: Sequence[tuple[Published, Row]]) -> str:
    """The generated part of docs/models.md."""
    lines = ["| model | published as | GB | converts | 1 GPU | 2 | 4 | 8 | planned in |", "| --- " * 9 + "|"]
    for published, row in found:
        cells = [published.model.name, SCHEMES[published.scheme].label, _gb(row.source), _converts(row)]
        cells += [_cell(row, ranks) for ranks in RANKS]
        lines.append(f"| {' | '.join([*cells, f'{row.seconds:.1f} s, {row.memory >> 20} MiB'])} |")
    slowest = max(found, key=lambda each: each[1].seconds)
    widest = max(found, key=lambda each: each[1].memory)
    lines += ["", f"Slowest: {slowest[0].model.name}, {slowest[1].seconds:.1f} s of at most {SECONDS}. Most memory: "]
    lines[-1] += f"{widest[0].model.name}, {widest[1].memory >> 20} MiB of at most {BYTES >> 20}."
    lines += ["", "## Which kernels run them", "", "| model | published as | kernels | files |", "| --- " * 4 + "|"]
    for published, row in found:
        if not row.refused:
            label = SCHEMES[published.scheme].label
            lines.append(f"| {published.model.name} | {label} | {'; '.join(row.kernels)} | {row.shards} |")
    lines += ["", "## What does not convert, and why", ""]
    for published, row in found:
        label = f"{published.model.name}, {SCHEMES[published.scheme].label}"
        lines += [f"- {label}: {reason}" for reason in row.refused]
    lines += ["", "## What does not split, and why", ""]
    for published, row in found:
        reasons: dict[str, list[str]] = {}
        for ranks, reason in row.why.items():
            reasons.setdefault(reason, []).append(ranks)
        label = f"{published.model.name}, {SCHEMES[published.scheme].label}"
        lines += [f"- {label}, {' and '.join(ranks)} GPUs: {reason}" for reason, ranks in reasons.items()]
    lines += ["", "## By card", ""]
    lines += list(_cards(found))
    lines += ["", "## Where the shapes are from", ""]
    lines += [f"- {name}: {source}" for name, source in {p.model.name: p.model.source for p, _ in found}.items()]
    return "\n".join(lines) + "\n"


def _cards(found: Sequence[tuple[Published, Row]]) -> Iterator[str]:
    """For each size of a GPU's memory and each number of GPUs: what fits there and on no fewer."""
    yield "Weights take at most 80 % of the memory, for there are activations and a KV cache. Each is listed once."
    yield ""
    yield "| memory of a GPU | 1 GPU | 2 | 4 | 8 |"
    yield "| --- " * 5 + "|"
    for memory in (12, 16, 24, 32, 48, 64, 128):
        cells: list[str] = []
        seen: set[int] = set()
        for ranks in RANKS:
            fits = [
                (number, f"{published.model.name} ({published.scheme})")
                for number, (published, row) in enumerate(found)
                if not row.refused
                and number not in seen
                and (size := row.per_gpu[str(ranks)]) is not None
                and size <= 0.8e9 * memory
            ]
            seen |= {number for number, _ in fits}
            cells.append(", ".join(name for _, name in fits) or "–")
        yield f"| {memory} GB | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="words of names; all where none is given")
    parser.add_argument("--write", type=Path, help="write the checkpoint of this name and scheme here, and keep it")
    parser.add_argument("--plan", type=Path, help="plan this folder and print the row")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md", help="the file to rewrite")
    parser.add_argument("--rows", type=Path, help="a file for the rows: a run that is cut off goes on from it")
    given = parser.parse_args()
    if given.write:
        (published,) = [p for p in PUBLISHED if set(given.names) <= {p.model.name, p.scheme}]
        print(f"{write(given.write, published):,} bytes of tensors, without their values, in {given.write}")
        return
    if given.plan:
        print(json.dumps(asdict(planned(given.plan))))
        return
    found = list(rows(given.names, given.rows))
    over: list[Any] = [p.model.name for p, row in found if row.seconds > SECONDS or row.memory > BYTES]
    text = page(found)
    if given.names:
        print(text)
    else:
        insert(given.page, "models", text)
    if over:
        raise SystemExit(f"planned in more than {SECONDS} s or {BYTES >> 20} MiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
