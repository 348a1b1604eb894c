"""Text of strangers in Markdown, cards and terminals: it is shown and does nothing else."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.cards import FACTS, NEWER
from support.checkpoints import FIXTURES, ROOT
from support.fuzz.case import command

from xpuquant.conversion.cli.output import Answer, Output
from xpuquant.conversion.cli.tables import TextTable, lines_of
from xpuquant.conversion.repo.card import render
from xpuquant.conversion.repo.card_merge import front_matter, merge, parse
from xpuquant.conversion.repo.source_card import kept_fields
from xpuquant.conversion.repo.yaml_front import MOST_CHARACTERS, is_read_whole, read_mapping
from xpuquant.conversion.report.markdown import render_markdown
from xpuquant.conversion.report.markup import fenced, listed, markdown, table, text
from xpuquant.conversion.verify.proof import Checked
from xpuquant.conversion.verify.verdict import Agreement, Finding, Sanity, Verdict
from xpuquant.errors import one_line

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
PLAIN = re.compile(r"(paragraph|table|thead|tbody|tr|th|td|bullet_list|list_item)_(open|close)|inline|text|softbreak")
BARE = re.compile(r"(?<!\\)(?:(?<=[A-Za-z])://|(?<=\bwww)\.|@)", re.IGNORECASE)
"""What GitHub and the Hub make links of without any brackets; a backslash before it stops them."""

PIECES = [
    "[x](javascript:alert(1))",
    "![a](http://b/c.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=y>",
    "# H",
    "```",
    "~~~",
    "- ",
    "* ",
    "1. ",
    "2) ",
    "> ",
    "|",
    "`",
    "*",
    "**",
    "_",
    "__x__",
    "[",
    "](",
    "![",
    "<a href=x>",
    "&lt;",
    "&#60;",
    "\\",
    "\n",
    "\r",
    "---",
    "===",
    "https://evil.com",
    "www.evil.com",
    "a@b.com",
    "<https://x.y>",
    "[x]: http://y",
    "<!-- xpuquant:end 0123456789abcdef -->",
    "<!-- xpuquant:begin 0123456789abcdef 0123456789abcdef -->\n",
    "$$x$$",
    "~~x~~",
    "\u2028",
    "\u202e",
    "    ",
    "\t",
    "x",
    "+ ",
    "javascript:x",
    "\x1b[31m",
    "\x7f",
    "\x9b31m",
    "model.layers.0.mlp",
    "%s{0}{a}",
    "\ud800",
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


def tokens(source: str) -> list[Token]:
    """All tokens of a text, blocks and what is in them."""
    return [token for block in PARSER.parse(source) for token in (block, *(block.children or ()))]


def active(source: str) -> Counter[str]:
    """What does more than show text: kind → how many."""
    return Counter(token.type for token in tokens(source) if not PLAIN.fullmatch(token.type))


@settings(max_examples=400, deadline=None)
@given(HOSTILE, HOSTILE)
def test_text_is_shown_and_does_nothing(a: str, b: str) -> None:
    for made in (text(a), markdown("Say {a} and {b}.", a=a, b=b), listed([a, b]), table(("x", "y"), [(a, b)])):
        assert not active(made) and not BARE.search(made), made
        assert all(char.isprintable() or char == "\n" for char in made)
    kinds = Counter(token.type for token in tokens(table(("x", "y"), [(a, b)])))
    assert (kinds["tr_open"], kinds["td_open"]) == (2, 2)
    assert [token.type for token in tokens(fenced(a, "sh"))] == ["fence"]
    shown = "".join(token.content for token in tokens(text(a)) if token.type == "text")
    assert shown == one_line(a, 1000).strip(), "nothing is lost either"


@settings(max_examples=100, deadline=None)
@given(st.lists(HOSTILE, min_size=6, max_size=6), st.booleans())
def test_cards_with_names_of_strangers(names: list[str], unverified: bool) -> None:
    """Every field that a stranger can fill: the card has the blocks, links and pictures of a harmless one."""
    a, b, c, d, e, f = names
    metadata = kept_fields(
        {"license": a, "license_name": b, "license_link": c, "tags": [d], "datasets": [e], "base_model": f}
    )
    hostile = replace(
        FACTS,
        base_model=metadata.get("base_model"),
        schemes=[replace(FACTS.schemes[0], source=a, stored=b)],
        left=[(c, d), (e, f)],
        command=f"xpuquant convert {a}",
        name=b,
        revision=c,
        source_metadata=metadata,
        verification=None if unverified else replace(FACTS.verification, lines=[d, e]),  # type: ignore[type-var]
    )
    harmless = replace(
        hostile,
        base_model=None if hostile.base_model is None else "a/b",
        schemes=[replace(FACTS.schemes[0], source="x", stored="x")],
        left=[("x", "x"), ("x", "x")],
        command="x",
        name="x",
        revision="x",
        source_metadata={},
        verification=None if unverified else replace(FACTS.verification, lines=["x", "x"]),  # type: ignore[type-var]
    )
    card = parse(render(hostile))
    expected = parse(render(harmless))
    assert card is not None and expected is not None
    assert (card.before, card.after.strip(), card.is_block_intact, card.is_edited) == ("", "", True, False)
    found = active(card.block) - Counter(s_close=0)
    assert found == active(expected.block), card.block
    assert all(char.isprintable() or char == "\n" for char in render(hostile))
    links = [token.attrs["href"] for token in tokens(card.block) if token.type == "link_open"]
    ours = ("https://docs.vllm.ai/", "https://huggingface.co/", "verify.", "#verification")
    assert all(str(link).startswith(ours) for link in links)
    assert front_matter(render(hostile))["library_name"] == "transformers"
    assert merge(render(hostile), render(harmless))[1] is None


@settings(max_examples=100, deadline=None)
@given(st.lists(HOSTILE, min_size=5, max_size=5))
def test_reports_with_names_of_strangers(names: list[str]) -> None:
    a, b, c, d, e = names
    run = Agreement("onednn", a, "linear", None, b, 8, 32, 8, (8,), "F32", 0.5, 0.5, 1.0, 0.5, 1e-6)
    made = Verdict(
        c,
        d,
        e,
        3,
        exact=[Checked(a, 1, b)],
        kernels=[run, replace(run, error=None, reason=c)],
        unavailable={d: e},
        sanity={a: Sanity()},
        schemes={a: b, b: c},
        findings=[Finding("integrity", c, d), Finding("sanity", d, e, fails=False)],
    )
    found = active(render_markdown(made))
    assert not found - Counter({"heading_open": 9, "heading_close": 9, "strong_open": 1, "strong_close": 1}), found


def test_markdown_is_made_in_one_place_from_literals() -> None:
    """mypy keeps `str` and `Markdown` apart; this sees that nobody gets around it."""
    for path in sorted((ROOT / "convert").rglob("*.py")):
        if path.name == "markup.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            assert node.func.id != "Markdown", f"{path}:{node.lineno}: only markup.py makes Markdown"
            if node.func.id in ("markdown", "joined"):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a template is a literal"


class TestTerminal:
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_output_of_any_encoding(self, encoding: str, options: list[str], tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        source = str(FIXTURES / "gptqmodel-qwen3-w4g32")
        words = [
            sys.executable,
            "-P",
            "-m",
            "xpuquant",
            "convert",
            source,
            str(tmp_path / "out"),
            "--no-verify",
            *options,
        ]
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode(encoding)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=HOSTILE)
    def test_answers_are_printable(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        table = TextTable(name, ("a", "b"), [(name, name)])
        answer = Answer([f"note: {name}", table], {"name": name, name: [name]}, name)
        assert all(line.isprintable() for width in (1, 20, 80) for _, line in lines_of(table, width))
        for quiet, as_json in ((True, False), (False, False), (False, True)):
            Output(as_json, quiet).answer(answer)
            out = capsys.readouterr().out
            assert all(char.isprintable() or char == "\n" for char in out), out
        assert json.loads(out)["name"] == name


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


class TestFrontMatter:
    @pytest.mark.parametrize(
        "bad",
        [
            "x: 2024-13-45",
            "x: !!int x",
            "x: 0x_",
            f"x: {'9' * 5000}",
            "x: !!bool maybe",
            "x: !!python/name:os.system",
            "? [1, 2]\n: 3",
            "x: !!timestamp y",
            "x: !!binary '%'",
            "1: 2",
            "x: .inf.",
            "x: !!float z",
            "x: 1e999",
            "x: !!set {a, b}",
            "x: !!omap [1]",
            "x: &a [*a]",
            f"x: {'[' * 9}{']' * 9}",
            BOMB,
            "<<: {license: evil}",
            "base: &b {license: evil}\n<<: *b",
        ],
    )
    def test_a_value_costs_its_own_field(self, bad: str) -> None:
        """In every way that a mapping is written."""
        text = f"license: &l mit\n{bad}\nbase_model: a/b\n"
        indented = "".join(f"  {line}\n" for line in text.splitlines())
        for whole in (text, indented, text.replace("\n", "\r\n")):
            found = read_mapping(whole)
            assert found["license"] == "mit" and found["base_model"] == "a/b"

    def test_sound_front_matter_is_read_whole(self) -> None:
        text = (
            "license: mit\ntags:\n- a\n- b: [c]\n\ntext: |\n  x\n  y\n'a b': {c: d}\nempty:\n# a remark\nz: >-\n  z\n"
        )
        for whole in (text, "{license: mit, tags: [a], x: {y: z}}", ""):
            assert read_mapping(whole) == (yaml.safe_load(whole) or {})
            assert is_read_whole(whole)

    @pytest.mark.parametrize("bad", ["date: 2024-13-45", "a: &a x\nb: *a", "x: !!int y", "? [1]\n: 2", "a: ["])
    def test_what_people_wrote_is_not_written_again_without_it(self, bad: str) -> None:
        assert not is_read_whole(f"license: mit\n{bad}\n")
        theirs = f"---\nmine: yes\n{bad}\n---\n" + render(FACTS).partition("---\n")[2].partition("---\n")[2]
        merged, _ = merge(render(NEWER), theirs)
        assert bad in merged and "mine: yes" in merged

    @pytest.mark.parametrize(
        "text_of",
        [
            "[" * 3000,
            "{" * 3000,
            BOMB.partition("\n")[2],
            "x: " + "y" * MOST_CHARACTERS,
            "a: [",
            "- list",
            "\x00",
            "x: &a [*a]",
            "\n".join(f"k{i}: v" for i in range(9000)),
            "x: " + "[" * 9 + "]" * 9,
        ],
        ids=["lists", "mappings", "aliases", "long", "open", "list", "NUL", "cycle", "many", "deep"],
    )
    def test_bounded(self, text_of: str) -> None:
        started = time.process_time()
        assert read_mapping(text_of) == {}
        assert time.process_time() - started < 3

    def test_what_is_kept_has_its_form(self) -> None:
        front = {
            "license": "apache-2.0",
            "license_name": "Llama 3",
            "license_link": "https://llama.com/license",
            "language": ["en", 7],
            "datasets": ["a/b", "javascript:x"],
            "thumbnail": "javascript:alert(1)",
            "pipeline_tag": "text generation",
            "tags": ["chat", ["x"] * 3, "<b>"],
            "base_model": ["<script>", "a/b"],
            "extra_gated_prompt": "[x](http://y)",
        }
        assert kept_fields(front) == {
            "license": "apache-2.0",
            "license_name": "Llama 3",
            "license_link": "https://llama.com/license",
            "language": ["en"],
            "datasets": ["a/b"],
            "tags": ["chat"],
            "base_model": "a/b",
        }

    @settings(max_examples=200, deadline=None)
    @given(
        st.recursive(
            HOSTILE | st.integers() | st.none() | st.floats(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=2),
            max_leaves=6,
        )
    )
    def test_any_value_is_kept_in_form_or_left_out(self, value: Any) -> None:
        found = kept_fields(
            dict.fromkeys(
                ("license", "license_name", "license_link", "language", "datasets", "tags", "base_model"), value
            )
        )
        for kept_value in found.values():
            for item in kept_value if isinstance(kept_value, list) else [kept_value]:
                assert isinstance(item, str) and item.isprintable() and len(item) <= 300

    @pytest.mark.parametrize(
        "bad",
        ["license: 2024-13-45", f"license: {'9' * 5000}", "license: !!int x", BOMB, 'base_model: "<script>\\n# H"'],
    )
    def test_a_conversion_ends_well_whatever_the_card(self, bad: str, tmp_path: Path) -> None:
        source = Path(shutil.copytree(FIXTURES / "gptqmodel-qwen3-w4g32", tmp_path / "source"))
        (source / "README.md").write_text(f"---\n{bad}\npipeline_tag: text-generation\n---\n# Model\n")
        started = time.process_time()
        code, said, error = command("convert", str(source), str(tmp_path / "out"), "--json", "--jobs", "1")
        assert (code, error) == (0, "") and json.loads(said)
        assert time.process_time() - started < 30
        card = (tmp_path / "out" / "README.md").read_text()
        assert len(card) < 10_000 and "<script>" not in card
