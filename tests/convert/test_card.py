"""The card: what it says, that its metadata is valid, and that nobody's edits are lost."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.cards import FACTS, NEWER
from support.checkpoints import FIXTURES

import xpuquant
from xpuquant.conversion.repo.card import render
from xpuquant.conversion.repo.card_merge import front_matter, merge, parse, rename


def test_metadata_puts_the_repo_below_its_base_and_keeps_the_license() -> None:
    data = front_matter(render(FACTS))
    assert data["base_model"] == "Qwen/Qwen3-30B-A3B-GPTQ-Int4"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "zh"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"xpu", "intel", "int4", "xpuquant", "chat"} <= set(data["tags"])
    assert not {"gptq", "4-bit"} & set(data["tags"])


def test_the_hub_client_reads_the_card() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(render(FACTS))
    assert card.data["base_model"] == FACTS.base_model
    assert card.data.to_dict()["base_model_relation"] == "quantized"


def test_body_says_command_sizes_what_was_left_and_how_to_serve() -> None:
    text = render(FACTS)
    for said in (
        FACTS.command,
        "17.0 GB",
        "16.9 GB",
        "lm_head: not quantized in the source",
        "vllm serve Qwen3-30B-xpu",
        'from_pretrained("Qwen3-30B-xpu"',
        "![",
        "(verify.svg)",
        "numpy 2.0",
        "0123456789abcdef",
        "| 96 |",
    ):
        assert said in text


def test_unverified_conversion_says_so() -> None:
    assert "--no-verify" in render(replace(FACTS, verification=None))


def test_an_unknown_base_gives_no_relation() -> None:
    data = front_matter(render(replace(FACTS, base_model=None)))
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_names_from_strangers_stay_in_their_cell() -> None:
    text = render(replace(FACTS, left=[("a|b<script>\nc", "why")]))
    assert "a\\|b&lt;script\\> c: why" in text


def test_equal_facts_give_equal_cards() -> None:
    assert render(FACTS) == render(FACTS)


def test_an_unedited_card_is_replaced() -> None:
    assert merge(render(NEWER), render(FACTS)) == (render(NEWER), None)


def test_text_around_the_generated_part_is_kept() -> None:
    theirs = render(FACTS).replace("<!-- xpuquant:begin", "My benchmark: 42 t/s\n\n<!-- xpuquant:begin")
    theirs += "\n## Thanks\n\nto everybody\n"
    text, remark = merge(render(NEWER), theirs)
    assert remark is None
    assert "My benchmark: 42 t/s" in text
    assert text.endswith("\n## Thanks\n\nto everybody\n")
    assert NEWER.command in text
    assert FACTS.command not in text


def test_edited_metadata_is_kept_and_brought_up_to_date() -> None:
    theirs = render(FACTS).replace("license: apache-2.0", "license: mit").replace("- chat", "- chat\n- mine")
    newer = replace(NEWER, schemes=[replace(FACTS.schemes[0], precision="fp8")])
    text, _ = merge(render(newer), theirs)
    data = front_matter(text)
    assert data["license"] == "mit"
    assert "mine" in data["tags"]
    assert "fp8" in data["tags"]
    assert "int4" not in data["tags"]


@pytest.mark.parametrize("theirs", ["# My own card\n", render(FACTS).replace("17.0 GB", "17 GB, wow")])
def test_a_rewritten_card_is_its_authors(theirs: str) -> None:
    text, remark = merge(render(NEWER), theirs)
    assert text == theirs
    assert remark is not None


@pytest.mark.parametrize("front", ["a: [", "a: !!bool maybe", "a: 2024-13-01", "- a list", "{" * 3000, "1: a"])
def test_whatever_a_strangers_metadata_is_it_stops_nothing(front: str) -> None:
    assert front_matter(f"---\n{front}\n---\n# Model\n") == {}
    theirs = render(FACTS).replace("tags:", "tags: mine\nothers:")
    assert front_matter(merge(render(NEWER), theirs)[0])["license"] == "apache-2.0"


def test_edits_in_the_folder_are_published() -> None:
    ours = render(NEWER) + "\nmy words\n"
    text, remark = merge(ours, render(FACTS))
    assert remark is None
    assert text.endswith("\nmy words\n")
    again, _ = merge(text, text)
    assert again == text


def test_text_survives_a_conversion_that_knows_nothing_of_it() -> None:
    """Edited on the Hub, merged and written back by a push, then converted and pushed again."""
    theirs = render(FACTS).replace("license: apache-2.0", "license: mit") + "\nmy words\n"
    published, _ = merge(render(FACTS), theirs)
    text, remark = merge(render(NEWER), published)
    assert remark is None
    assert text.endswith("\nmy words\n")
    assert front_matter(text)["license"] == "mit"
    assert NEWER.command in text


def test_an_edit_on_the_hub_after_one_in_the_folder_is_kept() -> None:
    published, _ = merge(render(FACTS) + "\nfirst\n", None)
    theirs = published.replace("first", "second")
    text, remark = merge(published, theirs)
    assert text.endswith("\nsecond\n")
    assert remark is None
    text, remark = merge(published.replace("first", "third"), theirs)
    assert text == theirs
    assert remark is not None


def test_a_card_of_ones_own_in_the_folder_is_published_as_it_is() -> None:
    assert merge("# Mine\n", render(FACTS)) == ("# Mine\n", None)


def test_rename_puts_the_repo_id_into_the_commands_and_nothing_else() -> None:
    text = rename(render(FACTS), "me/Qwen3")
    assert "vllm serve me/Qwen3\n" in text
    assert 'from_pretrained("me/Qwen3"' in text
    found = parse(text)
    assert found is not None
    assert found.is_block_intact
    assert not found.is_edited
    edited = render(FACTS) + "words"
    renamed = parse(rename(edited, "me/Qwen3"))
    assert renamed is not None
    assert renamed.is_edited


@given(before=st.text(), after=st.text())
def test_whatever_is_written_around_survives(before: str, after: str) -> None:
    before, after = (text.replace("xpuquant:", "").replace("\r", "") for text in (before, after))
    card = render(FACTS)
    start = card.index("<!-- xpuquant:begin")
    theirs = card[:start] + before + card[start:] + after
    text, remark = merge(render(NEWER), theirs)
    assert remark is None
    found = parse(text)
    assert found is not None
    assert (found.before, found.after) == (before, after)
    assert yaml.safe_load(found.front)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gptqmodel-qwen3-w4g32", "xpu"),
        ("gptqmodel-qwen3-w4g32", "compressed-tensors"),
        ("llmcompressor-qwen3moe-w4a16-asym", "xpu"),
    ],
)
def test_the_card_of_a_conversion(name: str, layout: str, tmp_path: Path) -> None:
    """How to install, which versions read it, which class loads it, what the picture shows; no place of this machine,
    no link to a file that is not there or to an index that has no release."""
    out = tmp_path / "model-xpu"
    made = xpuquant.convert(FIXTURES / name, out, layout=layout)
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text and str(FIXTURES) not in text and "/home" not in text
    assert f"{made.plan.source.auto_class}.from_pretrained" in text and "vllm serve model-xpu" in text
    releases = {module.releases for module in made.plan.modules if module.releases}
    if layout == "xpu":
        assert "`pip install .`" in text and "pip install xpuquant" not in text
        written = json.loads((out / "config.json").read_text())["quantization_config"]["format_version"]
        assert written == (2 if "moe" in name else 1)
        reads = {1: "1, which 0.1.0 reads too.", 2: "2, which 0.1.0 refuses: a newer release reads it"}[written]
        assert f"`format_version` {reads}" in text
        assert (
            "- vllm\\>=0.32,&lt;0.34; on Intel GPUs, vllm-xpu-kernels: 0.1.15" in text and "- transformers\\>=" in text
        )
        assert all(release in text for release in releases) and text.count("0.1.16.x") == 1
    else:
        assert "pip install compressed-tensors" in text and "vllm-xpu-kernels" not in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        assert (out / link).is_file() or link in ("#verification", "https://docs.vllm.ai/"), link
    (said,) = re.findall(r"!\[([^\]]+)\]\(verify.svg\)", text)
    assert said.startswith("Verified: ")
    assert ("of its tolerance" in said) != ("no kernel library computed them where this was checked" in said)
    assert "## Verification\n\nVerified against every value of the source" in text
