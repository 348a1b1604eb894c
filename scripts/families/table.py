"""The families that people serve: converted, loaded by the engines, and written down in docs/families.md.

    scripts/lanes/families                    every family that has no cells of these versions yet
    scripts/lanes/families --only llama4      one, again
    scripts/lanes/families --engines plan,transformers     without vLLM's environment
    scripts/lanes/families --engines vllm --overlay 0.33.0     vLLM's cells of a release that has no build for CPUs
    scripts/lanes/families --accept           cells that became worse are recorded too

Cells are recorded in xpuquant/families.json, from which `inspect`, the plan and the card say what is known of an
architecture.
A run that was cut off goes on where it was. Exits 1 where a cell is worse than the recorded one, or an engine fails on
what the plan converts without saying why in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
from bench.measure import insert  # noqa: E402
from support.families.catalogue import FAMILIES, Family  # noqa: E402
from support.families.processors import prompt_with_image  # noqa: E402

RECORD = ROOT / "xpuquant" / "families.json"
PAGE = ROOT / "docs" / "families.md"
HERE = Path(__file__).parent
AT_ONCE = 10
"""Families for which one vLLM process is started."""
TORCHVISION = "torchvision==0.28.0"
"""What goes with the torch of scripts/lanes/vllm, which leaves it out: vLLM's multimodal models import it."""
ENGINE = {"language_model_only": True}
"""Arguments of vLLM's `LLM`, besides a family's own."""
NEAR = {"float32": 1e-3, "bfloat16": 5e-2}
"""Difference of log-probabilities that is called the same, where the tokens are: of all in float32, of nine in ten in
bfloat16, in which rounding may choose another expert for a token. There another token may be said where the twin finds
it as likely as its own, within this difference; of that prompt nothing more is compared."""
RANK = {"fails": 0, "differs": 0, "not run": 1, "refused": 2, "same": 3, "converts": 3}
Cell = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY", choices=[one.name for one in FAMILIES])
    parser.add_argument("--engines", default="plan,transformers,vllm", help="which cells; default: %(default)s")
    parser.add_argument("--accept", action="store_true", help="record what became worse, too")
    parser.add_argument("--again", action="store_true", help="also what has cells of these versions")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "families", help="where models are written")
    parser.add_argument(
        "--vllm", type=Path, help="Python of an environment with vLLM; default: that of scripts/lanes/vllm"
    )
    parser.add_argument(
        "--overlay", metavar="VERSION", help="vLLM's Python of this release over that environment's compiled library"
    )
    arguments = parser.parse_args()
    record = _record()
    families = [one for one in FAMILIES if not arguments.only or one.name in arguments.only]
    engines = arguments.engines.split(",")
    bad: list[str] = []
    again = arguments.again or bool(arguments.only)
    environment = Environment(arguments.vllm, arguments.overlay) if "vllm" in engines else None
    for found in _cells(families, engines, arguments.work, environment, None if again else record):
        record = _record()  # another run may have written meanwhile
        bad += merge(record, found, arguments.accept)
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        insert(PAGE, "families", page(record))
    print("\n".join(bad))
    return 1 if bad else 0


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"families": {}}


class Environment:
    """A Python with vLLM, and what it is started with."""

    def __init__(self, python: Path | None, overlay: str | None) -> None:
        if python is None:
            subprocess.run([str(ROOT / "scripts" / "lanes" / "vllm"), "--env-only"], check=True)
            python = Path(os.environ.get("XPUQUANT_VENVS", ROOT)) / ".venv-vllm" / "bin" / "python"
        self.python = python
        self.variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **os.environ,
        }
        paths = [ROOT / ".cache" / TORCHVISION]
        if not paths[0].exists():
            pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
            subprocess.run([*pip, "--target", paths[0], TORCHVISION], check=True)
        if overlay is not None:
            subprocess.run([str(ROOT / "scripts" / "lanes" / "vllm-overlay"), overlay, "--env-only"], check=True)
            paths.insert(0, ROOT / ".cache" / "overlay" / overlay)
        self.variables["PYTHONPATH"] = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
        self.version = _version(python, "vllm", self.variables).split("+")[0]

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.python, *command], env=self.variables, capture_output=True, text=True, check=False)


def _cells(
    families: Sequence[Family],
    engines: Sequence[str],
    work: Path,
    vllm: Environment | None,
    known: Mapping[str, Any] | None,
) -> Iterator[dict[str, dict[str, Cell]]]:
    """Family → column → cell, as they come: plan and Transformers one by one, vLLM in batches."""
    names = [one.name for one in families]
    version = _version(Path(sys.executable), "transformers")
    if "transformers" in engines or "plan" in engines:
        wanted = [name for name in names if known is None or not _has(known, name, "transformers", version)]
        yield from _converted(wanted, work, version)
    if vllm is None:
        return
    wanted = [
        name
        for name in names
        if (work / name / "converted" / "config.json").exists()
        and (known is None or not _has(known, name, "vllm", vllm.version))
    ]
    ways = {one.name: (one.dtype, json.dumps({**ENGINE, **one.engine})) for one in families if one.name in wanted}
    for way in dict.fromkeys(ways.values()):
        alike = [name for name in ways if ways[name] == way]
        for at in range(0, len(alike), AT_ONCE):
            yield _served(vllm, alike[at : at + AT_ONCE], work, *way)


def _has(record: Mapping[str, Any], name: str, column: str, version: str) -> bool:
    return version in record["families"].get(name, {}).get(column, {})


def _converted(names: list[str], work: Path, version: str) -> Iterator[dict[str, dict[str, Cell]]]:
    """Runs cells.py; a family in which the process ends without a word is a cell of its own."""
    left = list(names)
    while left:
        command = [sys.executable, str(HERE / "cells.py"), str(work), *left]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            name, _, cells = line.partition(" ")
            if name not in left:
                continue
            print(line.rstrip(), flush=True)
            left.remove(name)
            yield {name: _dated(json.loads(cells), version)}
        if process.wait() and left:
            yield {left.pop(0): {"plan": {"outcome": "fails", "why": "the process ended"}}}


def _dated(cells: dict[str, Cell], version: str) -> dict[str, Cell]:
    today = date.today().isoformat()
    found = {"plan": {**cells["plan"], "date": today}}
    if "transformers" in cells:
        found["transformers"] = {version: {**cells["transformers"], "date": today}}
    return found


def _version(python: Path, package: str, variables: Mapping[str, str] | None = None) -> str:
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", asked], env=variables, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _served(vllm: Environment, names: list[str], work: Path, dtype: str, engine: str) -> dict[str, dict[str, Cell]]:
    """vLLM's cells: the tokens of each family's twin, and of the converted repo; with an image too, where the twin
    takes one."""
    kinds = {one.name: one.sees for one in FAMILIES}
    published = {name: (work / name / "published").exists() for name in names}
    twins = {name: str(work / name / ("published" if published[name] else "plain")) for name in names}
    pairs = {name: (twins[name], str(work / name / "converted")) for name in names}
    pictures = {
        folder: prompt_with_image(Path(folder), kinds[name]) for name in names for folder in pairs[name] if kinds[name]
    }
    reports = _reports(vllm, [folder for pair in pairs.values() for folder in pair], dtype, engine, pictures, work)
    blind = {n: str(reports[twins[n]]["error"]) for n in names if kinds[n] and "error" in reports[twins[n]]}
    reports |= _reports(vllm, [folder for name in blind for folder in pairs[name]], dtype, engine, {}, work)
    cells = {}
    for name in names:
        cell = _token_cell(*(reports[folder] for folder in pairs[name]), NEAR[dtype])
        if kinds[name] and cell["outcome"] in ("same", "differs"):
            cell["image"] = "not run: " + " ".join(blind[name].split())[:300] if name in blind else cell["outcome"]
        for key in ("why", "image"):
            if key in cell:
                cell[key] = cell[key].replace(str(work), "WORK")
        cells[name] = {"vllm": {vllm.version: {**cell, "date": date.today().isoformat()}}}
        print(name, json.dumps(cells[name]), flush=True)
    return cells


def _reports(
    vllm: Environment, folders: Sequence[str], dtype: str, engine: str, pictures: Mapping[str, list[int]], work: Path
) -> dict[str, Any]:
    """What each model says, by folder. One that fails behind others, and is not refused, is asked again in a process of
    its own: kernels of state space layers, for one, are in the way of whatever model vLLM loads after them."""
    reports: dict[str, Any] = {}
    while left := [folder for folder in folders if folder not in reports]:
        job = {"models": left, "dtype": dtype, "engine": json.loads(engine), "pictures": pictures}
        done = vllm.run(HERE / "tokens.py", json.dumps(job))
        (work / f"vllm-{vllm.version}.log").write_text(done.stdout + done.stderr)
        lines = [line.removeprefix("REPORT ") for line in done.stdout.splitlines() if line.startswith("REPORT ")]
        found = [json.loads(line) for line in lines]
        reports |= {one["model"]: one for at, one in enumerate(found) if not at or "error" not in one or _ours(one)}
        if not lines:  # the process ended in the first one
            reports[left[0]] = {"error": f"the process ended: {_last(done.stderr)}"}
    return reports


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:200]


def _ours(report: Mapping[str, Any]) -> bool:
    """Whether a model was refused by the plugin."""
    return str(report.get("error")).startswith(("UnsupportedError", "EnvironmentFault"))


def _token_cell(plain: Mapping[str, Any], converted: Mapping[str, Any], near: float) -> Cell:
    said = converted.get("error")
    if _ours(converted):
        return {"outcome": "refused", "why": str(said).partition(": ")[2][:400]}
    if "error" in plain:
        return {"outcome": "not run", "why": f"the twin: {' '.join(plain['error'].split())[:300]}"}
    if said is not None:
        return {"outcome": "fails", "why": " ".join(said.split())[:300]}
    differences: list[float] = []
    alike, ties = True, 0
    for said_by_twin, said_by_ours in zip(_steps(plain), _steps(converted), strict=True):
        for ours, twin in zip(said_by_ours, said_by_twin, strict=True):
            differences.append(abs(ours.logprob - twin.logprob))
            if ours.token != twin.token:
                # Rounding has chosen between two tokens that are as likely; what follows has another beginning.
                tied = near > 1e-2 and ours.token == twin.next_token and twin.logprob - twin.next_logprob <= near
                ties += tied
                alike &= tied
                break
    far = sum(difference > near for difference in differences)
    alike &= far <= (len(differences) // 10 if near > 1e-2 else 0)
    outcome = {"outcome": "same" if alike else "differs", "difference": max(differences)}
    return outcome | ({"ties": ties} if ties else {})


class Step(NamedTuple):
    """A token that was said, and the most likely one of the others."""

    token: int
    logprob: float
    next_token: int
    next_logprob: float


def _steps(report: Mapping[str, Any]) -> list[list[Step]]:
    """Of each prompt."""
    columns = zip(report["tokens"], report["logprobs"], report["next"], strict=True)
    return [[Step(token, logprob, *other) for token, logprob, other in zip(*column, strict=True)] for column in columns]


def merge(record: dict[str, Any], found: Mapping[str, Mapping[str, Any]], accept: bool) -> list[str]:
    """Put cells into the record; what is worse than before is said, and left out unless it is accepted."""
    bad = []
    for name, columns in found.items():
        old = record["families"].setdefault(name, {})
        for column, cells in columns.items():
            versions = {"": cells} if column == "plan" else cells
            for version, cell in versions.items():
                before = (old.get(column, {}) if column == "plan" else old.get(column, {}).get(version)) or {}
                worse = bool(before) and RANK[cell["outcome"]] < RANK[before["outcome"]]
                if worse or not RANK[cell["outcome"]]:
                    was = f", was {before['outcome']}" if worse else ""
                    bad.append(f"{name}, {column} {version}: {cell['outcome']}{was}: {cell.get('why', '')}")
                if worse and not accept:
                    continue
                if column == "plan":
                    old[column] = cell
                    if cell["outcome"] != "converts":  # nothing is left to load
                        for engine in ("transformers", "vllm"):
                            old.pop(engine, None)
                else:
                    old.setdefault(column, {})[version] = cell
    return bad


def page(record: Mapping[str, Any]) -> str:
    """The table and, below it, every reason."""
    families = [one for one in FAMILIES if "plan" in record["families"].get(one.name, {})]
    columns = {
        column: sorted({v for cells in record["families"].values() for v in cells.get(column, {})})
        for column in ("transformers", "vllm")
    }
    heads = [f"{'Transformers' if c == 'transformers' else 'vLLM'} {v}" for c, vs in columns.items() for v in vs]
    lines = [f"| family | architecture | quantized | plan | {' | '.join(heads)} |", "|" + "---|" * (4 + len(heads))]
    reasons: dict[str, list[str]] = {}
    for family in families:
        cells = record["families"][family.name]
        plan = cells["plan"]
        shown = [
            _shown(cells.get(c, {}).get(v), family, reasons) if plan["outcome"] == "converts" else "nothing to load"
            for c, versions in columns.items()
            for v in versions
        ]
        parts = f"{' and '.join(plan.get('quantized', []))}, {family.scheme}{', a layer of MTP' * bool(family.mtp)}"
        plan_cell = _shown(plan, family, reasons)
        lines.append(
            f"| {family.name} | {plan.get('architecture', '')} | {parts} | {plan_cell} | {' | '.join(shown)} |"
        )
    listed = [f"- {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, "", *listed, ""])


def _shown(cell: Mapping[str, Any] | None, family: Family, reasons: dict[str, list[str]]) -> str:
    if cell is None:
        return "–"
    outcome = str(cell["outcome"])
    if "why" in cell:
        reasons.setdefault(" ".join(cell["why"].replace("|", "/").split()), []).append(family.name)
    if "difference" not in cell:
        return outcome
    worst = max(cell["difference"], cell.get("with an image", 0.0))
    image = ", with an image too" if "with an image" in cell or cell.get("image") == "same" else ""
    image += f", ties: {cell['ties']}" if "ties" in cell else ""
    if str(cell.get("image", "")).startswith("not run"):
        reasons.setdefault(f"with an image, {cell['image']}", []).append(family.name)
    saved = cell.get("saved", "same")
    if saved != "same":
        reasons.setdefault(f"`save_pretrained`: {saved}", []).append(family.name)
    return f"{outcome}, {worst:.0e}{image}{'' if saved == 'same' else '; not saved'}" if worst else f"{outcome}{image}"


if __name__ == "__main__":
    sys.exit(main())
