"""What a folder says in which a conversion has begun and not ended, and what ends it."""

from __future__ import annotations

import re

from xpuquant.conversion.tree import Tree

STAGING = ".xpuquant"
"""Folder in an output: what is not put in place yet."""

_PART = re.compile(r"part-\d+-of-\d+\.jsonl")
"""The journal of a part, as `runs/parts.py` names it."""


def begun(tree: Tree) -> str | None:
    """That a folder holds an unfinished conversion, and the command that goes on with it; None where it holds none.

    Where a part was converted, `finish` ends it: the command that made the part finds nothing left to do.
    """
    if not tree.holds_anything(STAGING):
        return None
    if tree.is_folder(STAGING) and any(map(_PART.fullmatch, tree.below(STAGING).names())):
        return (
            "holds parts of an unfinished conversion; when every part is made, put them together: "
            f"xpuquant finish SRC {tree.path}"
        )
    return "holds an unfinished conversion; finish it first: run the same convert command again"
