"""Keeping what people write into a card that is generated again and again.

A card is: front matter, text, the generated part between two markers, text. The markers carry three digests: of the
generated part, of the front matter as generated, and of the whole card as we last wrote it. So a card tells by itself
what in it is somebody's, and whether it was touched since. The rules of `merge`:

- the generated part is replaced, the text around it is kept, edited metadata is kept and brought up to date;
- a card whose generated part was edited, or that has lost its markers, is its author's: it stays as it is;
- text around the generated part of the new card wins over older text, unless that was edited since.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

PRECISIONS = ("int4", "fp8", "mxfp4", "mxfp8")
"""Tags that say how the weights are stored, and change with them."""

_HINT = "Between these markers `xpuquant` writes; whatever you write outside is kept."
_BEGIN = re.compile(r"<!-- xpuquant:begin ([0-9a-f]{16}) ([0-9a-f]{16}) .*?-->\n")
_END = re.compile(r"\n<!-- xpuquant:end ([0-9a-f]{16}) -->\n?")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_SERVED = re.compile(r'(?P<call>^vllm serve |from_pretrained\(")(?P<name>[^\s"]+)', re.MULTILINE)


@dataclass(frozen=True)
class Parts:
    """A card, taken apart. `front` is YAML text; `block` the generated part without its markers."""

    front: str
    before: str
    block: str
    after: str
    block_digest: str
    front_digest: str
    card_digest: str

    @property
    def is_block_intact(self) -> bool:
        return _digest(self.block) == self.block_digest

    @property
    def is_custom(self) -> bool:
        """Whether any of it is not generated."""
        return bool(self.before.strip() or self.after.strip()) or self.is_front_custom

    @property
    def is_front_custom(self) -> bool:
        return _digest(self.front) != self.front_digest

    @property
    def is_edited(self) -> bool:
        """Whether it was touched since we last wrote it."""
        return self.digest != self.card_digest

    @property
    def digest(self) -> str:
        return _digest(self.front, self.before, self.block, self.after)


def merge(ours: str, theirs: str | None) -> tuple[str, str | None]:
    """The card to publish.

    Args:
        ours: the card of the new conversion (which may have been edited in its folder).
        theirs: the card that is there already, on the Hub or from an earlier conversion.

    Returns:
        (text, a remark for the user or None).
    """
    new = split(ours)
    if new is None:
        return ours, None  # somebody's own card, put into the folder to be published
    if theirs is None:
        return _seal(new, new.front, new.before, new.after), None
    old = split(theirs)
    if old is None or not old.is_block_intact:
        return theirs, "README.md there was rewritten by hand: kept as it is"
    is_same = (new.before, new.after) == (old.before, old.after)
    if old.is_edited and new.is_edited and not is_same:
        return theirs, "README.md was edited here and there; kept the one there"
    if new.is_custom and not old.is_edited:
        return _seal(new, new.front, new.before, new.after), None
    front = _update(old.front, new.front) if old.is_front_custom else new.front
    return _seal(new, front, old.before, old.after), None


def rename(text: str, name: str) -> str:
    """Put a repo id into the serving commands of the generated part."""
    parts = split(text)
    if parts is None or not parts.is_block_intact:
        return text
    block = _SERVED.sub(lambda match: match["call"] + name, parts.block)
    renamed = replace(parts, block=block)
    whole = parts.card_digest if parts.is_edited else renamed.digest
    return _assemble(renamed, whole)


def join(metadata: Mapping[str, Any], block: str) -> str:
    """A new card."""
    front = _yaml(metadata)
    new = Parts(front, "", block, "", "", _digest(front), "")
    return _assemble(new, new.digest)


def split(text: str) -> Parts | None:
    """Take a card apart; None where the markers are gone."""
    text = text.replace("\r\n", "\n")
    front = _FRONT.match(text)
    body = text[front.end() :] if front else text
    begin = _BEGIN.search(body)
    end = _END.search(body, begin.end()) if begin else None
    if begin is None or end is None:
        return None
    inside = body[begin.end() : end.start()]
    outside = body[: begin.start()], body[end.end() :]
    return Parts(front[1] if front else "", outside[0], inside, outside[1], begin[1], begin[2], end[1])


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of any card; empty where there is none or it is not a mapping."""
    import yaml  # type: ignore[import-untyped]  # huggingface_hub brings it

    match = _FRONT.match(text)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _update(theirs: str, ours: str) -> str:
    """Their metadata with our new facts: what they set stays, tags are joined, stale precisions go."""
    old, new = front_matter(f"---\n{theirs}\n---\n"), front_matter(f"---\n{ours}\n---\n")
    tags = [tag for tag in old.get("tags") or [] if tag not in PRECISIONS]
    merged = {**new, **old, "tags": [*tags, *(tag for tag in new.get("tags", []) if tag not in tags)]}
    return theirs if merged == old else _yaml(merged)


def _yaml(metadata: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)).strip()


def _seal(new: Parts, front: str, before: str, after: str) -> str:
    sealed = replace(new, front=front, before=before, after=after)
    return _assemble(sealed, sealed.digest)


def _assemble(parts: Parts, whole: str) -> str:
    head = f"---\n{parts.front}\n---\n" if parts.front else ""
    begin = f"<!-- xpuquant:begin {_digest(parts.block)} {parts.front_digest} {_HINT} -->\n"
    end = f"\n<!-- xpuquant:end {whole} -->\n"
    return f"{head}{parts.before}{begin}{parts.block}{end}{parts.after}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
