"""What a server answers that no Hub answers: another commit, other sizes, no digests, names that lead elsewhere. The
list of a commit's files is taken at its word; it must still be one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import FIXTURES
from support.hub.process import Hub

from xpuquant import api
from xpuquant.conversion.hub.client import check_names
from xpuquant.errors import EnvironmentFault, XpuquantError

pytest_plugins = "support.hub.fixtures"

SOURCE = "producer/model"


@pytest.fixture
def model(hub: Hub, client: str, tmp_path: Path) -> None:
    hub.seed(SOURCE, FIXTURES / "gptqmodel-qwen3-w4g32", xet=client == "xet")


LISTED = "/api/models/"
LIES: dict[str, tuple[str, list[tuple[str, str]], dict[str, str], str]] = {
    "commit elsewhere": (LISTED, [('"sha": "[0-9a-f]+"', '"sha": "../../../../../evil"')], {}, "a commit that is none"),
    "no commit": (LISTED, [('"sha": "[0-9a-f]+"', '"sha": null')], {}, "a commit that is none"),
    "negative size": (LISTED, [('"size": [0-9]+', '"size": -1')], {}, "has the size -1"),
    "endless size": (LISTED, [('"size": [0-9]+', '"size": 99999999999999999999')], {}, "has the size 9999"),
    "worded size": (LISTED, [('"size": [0-9]+', '"size": "huge"')], {}, "has the size 'huge'"),
    "no size": (LISTED, [('"size": [0-9]+', '"size": null')], {}, "has the size None"),
    "short sha256": (
        LISTED,
        [('"sha256": "[0-9a-f]+"', '"sha256": "abc"')],
        {},
        "digest in the Hub's list that is none",
    ),
    "counted sha256": (LISTED, [('"sha256": "[0-9a-f]+"', '"sha256": 7')], {}, "digest in the Hub's list that is none"),
    "counted sha1": (LISTED, [('"blobId": "[0-9a-f]+"', '"blobId": [1]')], {}, "digest in the Hub's list that is none"),
    "no digest": (LISTED, [('"blobId": "[0-9a-f]+"', '"blobId": null')], {}, "without a digest"),
    "no list": (LISTED, [(r'"siblings": \[.*\]', '"siblings": 7')], {}, ""),
    "odd list": (LISTED, [(r'"siblings": \[.*\]', '"siblings": [7]')], {}, ""),
    "no object": (LISTED, [(r"\{.*\}", "[]")], {}, ""),
    "no JSON": (LISTED, [(r"\{.*\}", "{")], {}, ""),
    "deep JSON": (LISTED, [(r"\{.*\}", "[" * 100_000)], {}, ""),
    "a name elsewhere": ("/resolve/", [], {"ETag": '"../../../../../evil"'}, "name of no file"),
    "an absolute name": ("/resolve/", [], {"ETag": '"/EVIL"'}, "name of no file"),
    "a linked name": ("/resolve/", [], {"X-Linked-Etag": 'W/"a/../../../../../evil"'}, "name of no file"),
    "another commit": ("/resolve/", [], {"X-Repo-Commit": "../../../../../evil"}, ""),
}
"""What a server says of a repository that no Hub says: (requests that it answers so, other words of the body, headers,
what the user is told)."""


@pytest.mark.parametrize("client", ["lfs"], indirect=True)
@pytest.mark.parametrize("case", LIES)
def test_a_server_that_lies_leads_nowhere(hub: Hub, client: str, model: None, tmp_path: Path, case: str) -> None:
    """One line, and nothing is written outside the cache, whatever a mirror answers."""
    path, lie, headers, said = LIES[case]
    evil = tmp_path / "evil"
    headers = {name: text.replace("/EVIL", str(evil)) for name, text in headers.items()}
    hub.arm({"method": "", "path": path, "lie": lie, "headers": headers, "times": 10_000})
    outside = {place for place in tmp_path.parent.rglob("*") if "hub" not in place.parts and "cache" not in place.parts}
    with pytest.raises(XpuquantError, match=re.escape(said) or None) as caught:
        api.convert(SOURCE, tmp_path / "out")
    assert "\n" not in str(caught.value) and caught.value.exit_code in (2, 3, 4)
    now = {place for place in tmp_path.parent.rglob("*") if "hub" not in place.parts and "cache" not in place.parts}
    assert now == outside and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("method", "tag", "is_none"),
    [
        ("HEAD", 'W/"../x"', True),
        ("HEAD", '"/etc/passwd"', True),
        ("HEAD", "/etc/passwd", True),
        ("HEAD", '"a/../b"', True),
        ("HEAD", '"0b75c1e3//9+=/"', False),
        ("HEAD", 'W/"1c5a-QmFzZTY0Ly8vLw//"', False),
        ("HEAD", '"d41d8cd98f00b204e9800998ecf8427e-12"', False),
        ("GET", '"/base64"', False),
    ],
)
def test_tags_that_are_names_elsewhere(method: str, tag: str, is_none: bool) -> None:
    """And none that a sound server gives: `check_names` looks at what the client makes names of."""
    url = SimpleNamespace(host="hub")
    answer = SimpleNamespace(headers={"ETag": tag}, request=SimpleNamespace(method=method, url=url))
    if is_none:
        with pytest.raises(EnvironmentFault, match="hub answers with an ETag that is the name of no file"):
            check_names(answer)
    else:
        check_names(answer)
