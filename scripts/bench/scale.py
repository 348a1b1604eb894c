"""A large checkpoint on paper: time, memory, disk and traffic, from measured rates.

    python scripts/bench/scale.py --verified 0.45 [--hash 2.0] [--cores 2] [--size 1000] [--nodes 16]
                                 [--shard 5] [--markdown docs/scale.md]

Rates are GB/s of one node. `--verified` is the size over the verified time in a table of convert.py, for shards are
checked while they are written; `--hash` is one thread's sha256 of files in the page cache, of which `finish` runs one
on each core.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.measure import insert


def table(size: float, shard: float, nodes: int, verified: float, hashing: float, cores: int) -> str:
    """Markdown for `size` GB in shards of `shard` GB: one node against `nodes`."""
    shards = math.ceil(size / shard)
    rows = [("", "one node", f"{nodes} nodes"), ("---",) * 3]
    share = [(n, math.ceil(shards / n)) for n in (1, nodes)]
    # A node makes whole shards: the one with most of them is the last to end.
    bytes_each = [min(size, most * shard) for _, most in share]
    converting = [each / verified for each in bytes_each]
    rows.append((f"shards of {shard:g} GB", str(shards), f"at most {share[1][1]} each"))
    rows.append(("read from the storage", _gb(size), f"{_gb(bytes_each[1])} each"))
    rows.append(("read again out of memory", _gb(2 * size), f"{_gb(2 * bytes_each[1])} each"))
    rows.append(("written", f"about {_gb(size)}", f"about {_gb(bytes_each[1])} each"))
    rows.append(("traffic of a node while converting", *(f"{verified:g} GB/s in, {verified:g} GB/s out",) * 2))
    rows.append(("the storage must give", *(f"{verified * n:.1f} GB/s each way" for n in (1, nodes))))
    rows.append(("disk", f"{_gb(2 * size)}: source and output", "the same, shared"))
    rows.append(("memory", "under 1 GiB", "under 1 GiB each"))
    rows.append(("converting and verifying", *(_minutes(seconds) for seconds in converting)))
    rehash = size / hashing / cores
    rows.append(("hashing what the parts wrote (`finish`; not with Ray)", "–", f"{_minutes(rehash)}, one node"))
    total = (converting[0], converting[1] + rehash)
    rows.append(("together", *(_minutes(seconds) for seconds in total)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _gb(size: float) -> str:
    return f"{size / 1000:g} TB" if size >= 1000 else f"{size:.0f} GB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds / 60:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verified", type=float, required=True, help="GB/s of one node, converted and verified")
    parser.add_argument("--hash", type=float, default=2.0, help="GB/s of one thread")
    parser.add_argument("--cores", type=int, default=2, help="of one node")
    parser.add_argument("--size", type=float, default=1000.0, help="GB of the checkpoint")
    parser.add_argument("--shard", type=float, default=5.0, help="GB of an output file")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--markdown", type=Path, help="renew the table in this file")
    given = parser.parse_args()
    rates = f"{given.verified:g} GB/s converted and verified, {given.hash:g} GB/s hashed by each of {given.cores} cores"
    text = f"Rates of one node: {rates}.\n\n" + table(
        given.size, given.shard, given.nodes, given.verified, given.hash, given.cores
    )
    print(text)
    if given.markdown:
        insert(given.markdown, "plan_scale", text)


if __name__ == "__main__":
    main()
