"""What every real checkpoint becomes, as digests: tests/fixtures/outputs.json.

    PYTHONSAFEPATH=1 PYTHONPATH=tests python -m support.outputs        records them anew, and prints which changed

A change of bytes is then a visible line of a diff. Digests are over shards, index and config.json (without the tool's
own version), not over the card and the records, whose words may change. A refusal is recorded as its exit code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

from support.checkpoints import FIXTURES, all_checkpoints
from xpuquant.conversion.cli.app import run

OPTIONS: dict[str, list[str]] = {
    "xpu": [],
    "xpu, dequantized": ["--on-unsupported", "dequantize"],
    "xpu, float16 scales, small shards": ["--scale-dtype", "float16", "--max-shard-size", "200KB"],
    "xpu, folded": ["--fold-act-order"],
    "compressed-tensors": ["--layout", "compressed-tensors"],
    "compressed-tensors, dequantized": ["--layout", "compressed-tensors", "--on-unsupported", "dequantize"],
}
"""Name → options of `convert`; each changes the bytes of some checkpoint."""

RECORD = FIXTURES / "outputs.json"


def outcome(source: Path, options: list[str], out: Path) -> str:
    """The digest of a conversion's weights and configs, or `exit N`."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(["convert", str(source), str(out), "--no-verify", *options])
    if code:
        return f"exit {code}"
    digest = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors*")):
        digest.update(path.name.encode() + path.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].pop("producer", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def recorded() -> dict[str, dict[str, str]]:
    """Checkpoint → options' name → outcome."""
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    return found


def main() -> int:
    before = recorded() if RECORD.exists() else {}
    after = dict(before)
    for name, source in all_checkpoints().items():
        after[name] = {}
        for key, options in OPTIONS.items():
            with tempfile.TemporaryDirectory() as scratch:
                after[name][key] = outcome(source, options, Path(scratch) / "out")
            if after[name][key] != before.get(name, {}).get(key):
                sys.stdout.write(f"{name}, {key}: {before.get(name, {}).get(key)} → {after[name][key]}\n")
    RECORD.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
