"""Keeping what people write into a card that is generated again and again.

A card is: front matter (YAML), text, the generated block between two markers, text. The markers carry three digests: of
the generated block, of the front matter as generated, and of the whole card as we last wrote it. So a card tells by
itself what in it is somebody's, and whether it was touched since. The rules of `merge`:

- the generated block is replaced, the text around it is kept, edited metadata is kept and brought up to date;
- a card whose generated block was edited, or that has lost its markers, is its author's: it stays as it is;
- text around the generated block of the new card wins over older text, unless that was edited since.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.repo.journal import PROVENANCE, STAGING
from xpuquant.conversion.repo.staging import EARLIER_CARD, Staging
from xpuquant.conversion.repo.yaml_front import is_read_whole, read_mapping
from xpuquant.conversion.sources.repo_files import MAX_TEXT_BYTES
from xpuquant.conversion.tree import Tree
from xpuquant.errors import UsageError
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.report.markup import Markdown

CARD = "README.md"
PRECISIONS = ("int4", "fp8", "mxfp4", "mxfp8")
"""Tags that say how the weights are stored, and change with them."""

_HINT = "Between these markers `xpuquant` writes; whatever you write outside is kept."
_BEGIN = re.compile(r"<!-- xpuquant:begin ([0-9a-f]{16}) ([0-9a-f]{16}) .*?-->\n")
_END = re.compile(r"\n<!-- xpuquant:end ([0-9a-f]{16}) -->\n?")
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_SERVED = re.compile(r"^vllm serve .+$", re.MULTILINE)
_LOADED = re.compile(r'from_pretrained\("(?:[^"\\\n]|\\.)*"')
_MARKER = re.compile(r"<(?=!--\s*xpuquant:)")


@frozen
class Card:
    """A card, taken apart.

    front          YAML, without the lines of dashes
    before, after  text around the generated block
    block          the generated block, without its markers
    block_digest, front_digest, card_digest  what the markers say
    """

    front: str
    before: str
    block: str
    after: str
    block_digest: str
    front_digest: str
    card_digest: str

    @property
    def is_block_intact(self) -> bool:
        """Whether the generated block is as it was written."""
        return _digest(self.block) == self.block_digest

    @property
    def is_custom(self) -> bool:
        """Whether anything in it is not generated."""
        return bool(self.before.strip() or self.after.strip()) or self.is_front_custom

    @property
    def is_front_custom(self) -> bool:
        """Whether the front matter is not as it was generated."""
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
    new = parse(ours)
    if new is None:
        return ours, None  # somebody's own card, put into the folder to be published
    if theirs is None:
        return _written(new), None
    old = parse(theirs)
    if old is None or not old.is_block_intact:
        return theirs, "README.md there was rewritten by hand: kept as it is"
    is_same = (new.before, new.after) == (old.before, old.after)
    if old.is_edited and new.is_edited and not is_same:
        return theirs, "README.md was edited here and there; kept the one there"
    if new.is_custom and not old.is_edited:
        return _written(new), None
    front = _updated(old.front, new.front) if old.is_front_custom else new.front
    return _written(replace(new, front=front, before=old.before, after=old.after)), None


def rename(text: str, name: str) -> str:
    """Put a repo id into the serving commands of the generated block."""
    card = parse(text)
    if card is None or not card.is_block_intact:
        return text
    block = _SERVED.sub(lambda _: served_by_vllm(name), card.block)
    block = _LOADED.sub(lambda _: loaded_by_transformers(name), block)
    renamed = replace(card, block=block)
    return _text(renamed, card.card_digest if card.is_edited else renamed.digest)


def served_by_vllm(name: str) -> str:
    """The command that serves a folder or repo id."""
    return f"vllm serve {shlex.quote(name)}"


def loaded_by_transformers(name: str) -> str:
    """The beginning of the call that loads one."""
    return f"from_pretrained({json.dumps(name)}"


def generate(metadata: Mapping[str, Any], block: Markdown) -> str:
    """A new card: front matter, and the generated block. Nothing in it can pass for one of our markers."""
    front = _yaml(metadata)
    marked = _MARKER.sub("&lt;", block)
    return _written(Card(front, "", marked, "", "", _digest(front), ""))


def parse(text: str) -> Card | None:
    """Take a card apart; None where the markers are gone."""
    text = text.replace("\r\n", "\n")
    front = _FRONT.match(text)
    body = text[front.end() :] if front else text
    begin = _BEGIN.search(body)
    end = _END.search(body, begin.end()) if begin else None
    if begin is None or end is None:
        return None
    before, block, after = body[: begin.start()], body[begin.end() : end.start()], body[end.end() :]
    return Card(front[1] if front else "", before, block, after, begin[1], begin[2], end[1])


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of any card; empty where there is none or it is not a mapping."""
    match = _FRONT.match(text)
    return _metadata(match[1]) if match else {}


def is_named(text: str, field: str) -> bool:
    """Whether a card's front matter has a line that begins with a field's name, readable or not."""
    match = _FRONT.match(text)
    return match is not None and re.search(rf"^{re.escape(field)}\s*:", match[1], re.MULTILINE) is not None


def _metadata(front: str) -> dict[str, Any]:
    return dict(read_mapping(front))


def _updated(theirs: str, ours: str) -> str:
    """Their front matter with our new facts: what they set stays, tags are joined, stale precisions go."""
    old, new = _metadata(theirs), _metadata(ours)
    if not old or not is_read_whole(theirs):
        return theirs  # not all of it can be read: it is theirs, and stays as it is
    said = old.get("tags")
    tags = [tag for tag in (said if isinstance(said, list) else []) if tag not in PRECISIONS]
    merged = {**new, **old, "tags": [*tags, *(tag for tag in new.get("tags", []) if tag not in tags)]}
    return theirs if merged == old else _yaml(merged)


def _yaml(metadata: Mapping[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]  # huggingface_hub brings it

    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)).strip()


def _written(card: Card) -> str:
    """The text of a card that we write now."""
    return _text(card, card.digest)


def _text(card: Card, card_digest: str) -> str:
    front = f"---\n{card.front}\n---\n" if card.front else ""
    begin = f"<!-- xpuquant:begin {_digest(card.block)} {card.front_digest} {_HINT} -->\n"
    end = f"\n<!-- xpuquant:end {card_digest} -->\n"
    return f"{front}{card.before}{begin}{card.block}{end}{card.after}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def check_card(out: Path) -> None:
    """Whether the card of an earlier conversion can be kept: said before the work. What people wrote into it goes into
    the new one, so it has to be a card's size, and nobody else's file.

    Raises:
        DamagedError: it is too large to be read. UsageError: it has a second name elsewhere, or is in another encoding
            than UTF-8, in which it would be written again.
    """
    tree = Tree(out)
    _card_in(tree)
    _read(tree.below(STAGING), EARLIER_CARD)


def keep_card(staging: Staging) -> None:
    """Set an earlier conversion's card aside: what people wrote into it goes into the new one.

    Raises: as `check_card`.
    """
    card = _card_in(Tree(staging.out))
    if card is not None:
        staging.tree.write(EARLIER_CARD, card.encode())


def staged_card(staging: Tree) -> str | None:
    """The card of an earlier conversion that was set aside in a staging folder; None where there is none.

    Raises: as `check_card`.
    """
    return _read(staging, EARLIER_CARD)


def _card_in(out: Tree) -> str | None:
    return _read(out, CARD) if out.holds(PROVENANCE) else None


def _read(tree: Tree, name: str) -> str | None:
    return read_card(tree, name) if tree.holds(name) else None


def read_card(tree: Tree, name: str = CARD) -> str:
    """The card of a converted repo, to be written again.

    Raises: as `check_card`. OSError: there is none.
    """
    try:
        return tree.read(name, MAX_TEXT_BYTES, sole=True).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(
            f"{tree.path / name}: is not UTF-8, as a card has to be; save it so, or move it away"
        ) from None
