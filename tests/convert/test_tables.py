"""Tables on a terminal: no wider than it, nothing lost, broken between words, and what is not shown is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xpuquant.conversion.cli.tables import TextTable, lines_of

WORDS = st.lists(st.text("abcxyz", min_size=1, max_size=12), max_size=8).map(" ".join)
FACTS = TextTable(
    "",
    ("", ""),
    [
        ("verified", "7 matrices decode exactly to the source; reference within 3e-08 of float64; onednn within 4e-07"),
        ("written to", "/srv/models/Qwen3-30B-A3B-GPTQ-Int4-xpu"),
    ],
)


def text(table: TextTable, width: int | None, every: bool = False) -> list[str]:
    return [line for _, line in lines_of(table, width, every)]


def test_facts_have_no_header_and_break_between_words() -> None:
    assert text(FACTS, 50) == [
        "verified    7 matrices decode exactly to the",
        "            source; reference within 3e-08 of",
        "            float64; onednn within 4e-07",
        "written to  /srv/models/Qwen3-30B-A3B-GPTQ-Int4-",
        "            xpu",
    ]
    assert text(FACTS, None) == [f"{label.ljust(10)}  {value}" for label, value in FACTS.rows]


@given(rows=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), width=st.integers(60, 130))
def test_nothing_is_lost_and_no_word_is_cut(rows: list[tuple[str, str, str]], width: int) -> None:
    table = TextTable("title", ("one", "two", "three"), rows)
    lines = text(table, width)
    assert all(len(line) <= width for line in lines)
    words = sorted(word for row in rows for cell in row for word in cell.split())
    assert sorted(word for line in lines[2:] for word in line.split()) == words
    assert len(text(table, None)) == len(rows) + 2


def test_rows_that_are_not_shown_are_counted() -> None:
    table = TextTable("", ("n", "of"), [(str(i), "x") for i in range(7)], most=3)
    assert text(table, 80)[-1] == "and 4 more; " and len(text(table, 80)) == 5
    assert len(text(table, 80, every=True)) == 8


def test_a_name_longer_than_the_terminal_breaks_at_its_dots() -> None:
    table = TextTable("", ("", ""), [("name", "model.layers.0.self_attn.q_proj.weight_scale")])
    lines = text(table, 30)
    assert "".join(line[6:] for line in lines) == table.rows[0][1]
    assert all(line.endswith((".", "_", "scale")) for line in lines)


def test_a_size_keeps_its_unit() -> None:
    table = TextTable("", ("what it is", "size"), [("word " * 30, "55.3 kB")])
    assert any(line.endswith("55.3 kB") for line in text(table, 40))
