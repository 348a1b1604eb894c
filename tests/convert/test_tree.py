"""The door to strangers' files: no link is written through, none is read that leads elsewhere, nothing waits."""

from __future__ import annotations

import ast
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from xpuquant.conversion.repo.checksums import hash_file
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.walk import is_hidden, wrong_name
from xpuquant.errors import DamagedError, UsageError, XpuquantError

ROOT = Path(__file__).parents[2]

NAMES = {
    "": "no name",
    "/etc/passwd": "no path below",
    "..": "no path below",
    "a/../../b": "no path below",
    "a//b": "no path below",
    "./a": "no path below",
    "a/": "no path below",
    "a\0b": "control characters",
    "\ud800": "control characters",
    "a\nb": "control characters",
    "x" * 300: "too long",
    "é" * 200: "too long",
    "/".join(["x" * 100] * 40): "no path below|too long",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder, and a victim beside it."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "file").write_text("ours")
    (tmp_path / "here" / ".git").mkdir()
    (tmp_path / "here" / ".git" / "config").write_text("secret")
    return tmp_path / "here"


def is_untouched(place: Path) -> bool:
    outside = (place.parent / "victim", place.parent / "elsewhere" / "file")
    return all(path.read_text() == "precious" for path in outside) and len(list(outside[1].parent.iterdir())) == 1


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names(name: str, place: Path) -> None:
    assert wrong_name(name) is not None
    tree = Tree(place)
    calls: list[Callable[[], object]] = [
        lambda: tree.read(name, 9),
        lambda: tree.write(name, b""),
        lambda: tree.below(name),
        lambda: tree.remove(name),
        lambda: tree.drop(name),
        lambda: tree.move("file", tree, name or "/"),
    ]
    for call in calls:
        with pytest.raises(DamagedError):
            call()
    assert (place / "file").read_text() == "ours"


LINKS = {
    "out": ("../victim", "out of the folder"),
    "absolute": ("/etc/passwd", "out of the folder"),
    "device": ("/dev/zero", "out of the folder"),
    "nowhere": ("missing", "leads nowhere"),
    "itself": ("link", "leads nowhere"),
    "folder": ("sub", "link to a folder"),
    "above": ("..", "link to a folder"),
    "own folder": (".", "link to a folder"),
    "a tool's": (".git/config", "not copied"),
    "around to a tool's": ("sub/../.git/config", "not copied"),
    "a blob that is none": ("../../blobs/passwd", "out of the folder"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_are_not_read(case: str, place: Path) -> None:
    target, message = LINKS[case]
    (place / "link").symlink_to(target)
    tree = Tree(place)
    for call in (lambda: tree.read("link", 100), lambda: tree.open("link"), lambda: tree.size("link"), tree.files):
        with pytest.raises(UsageError, match=message):
            call()
    assert not tree.holds("link") and tree.holds_anything("link")


def test_links_that_are_read(place: Path, tmp_path: Path) -> None:
    (place / "sub" / "other").symlink_to("../file")
    (place / "absolute").symlink_to(place / "file")
    (place / "twice").symlink_to("sub/other")
    tree = Tree(place)
    assert {tree.read(name, 9) for name in ("sub/other", "absolute", "twice")} == {b"ours"}
    means = {listed.name: listed.means for listed in tree.files()}
    assert means == dict.fromkeys(("file", "absolute", "sub/other", "twice"), "file")


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    """From a snapshot to the repository's blobs, and from there to those that all share."""
    snapshot, mine, shared = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs", tmp_path / "blobs"
    for folder in (snapshot / "sub", mine, shared):
        folder.mkdir(parents=True)
    one, two, three = "a" * 40, "b" * 64, "c" * 64
    (mine / one).write_text("one")
    (shared / "cc").mkdir()
    (shared / "cc" / three).write_text("two")
    (mine / two).symlink_to(f"../../blobs/cc/{three}")
    (snapshot / "sub" / "x").symlink_to(f"../../../blobs/{one}")
    (snapshot / "y").symlink_to(f"../../blobs/{two}")
    tree = Tree(snapshot)
    assert (tree.read("sub/x", 9), tree.read("y", 9), tree.blob("y")) == (b"one", b"two", two)
    assert [listed.means for listed in tree.files()] == ["sub/x", "y"]
    (snapshot / "z").symlink_to("../../refs")
    with pytest.raises(UsageError, match="out of the folder"):
        tree.read("z", 9)


def copied(tree: Tree, name: str) -> None:
    with TemporaryDirectory() as room:
        given = Tree(Path(room))
        given.write(name, b"x")
        tree.copy_from(given, name, 9)


CHANGES: dict[str, Callable[[Tree, str], object]] = {
    "create": lambda tree, name: os.close(tree.create(name)),
    "write": lambda tree, name: tree.write(name, b"x"),
    "copy": copied,
    "move": lambda tree, name: tree.move("file", tree, name),
    "remove": lambda tree, name: tree.remove(name),
    "drop": lambda tree, name: tree.drop(name),
    "append": lambda tree, name: os.close(tree.update(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["link", "folder's link", "hard link", "staged link"])
def test_nothing_is_changed_through_a_link(change: str, how: str, place: Path) -> None:
    """A file's second name is none of ours either: it is made anew, not written into."""
    tree, name = Tree(place), "x"
    if how == "link":
        (place / "x").symlink_to("../victim")
    elif how == "hard link":
        os.link(place.parent / "victim", place / "x")
    elif how == "folder's link":
        (place / "away").symlink_to("../elsewhere")
        name = "away/file"
    else:
        (place / "away").symlink_to("../elsewhere")
        tree, name = Tree(place).below("away"), "file"
    with suppress(UsageError, FileNotFoundError):
        CHANGES[change](tree, name)
    assert is_untouched(place)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_APPEND | os.O_CREAT])
def test_nothing_is_changed_in_place_that_has_a_second_name(flags: int, place: Path) -> None:
    os.link(place.parent / "victim", place / "x")
    with pytest.raises(UsageError, match="has a second name elsewhere"):
        Tree(place).update("x", flags)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize("make", [make_pipe, make_socket, Path.mkdir])
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)  # names of sockets are short
    make(Path("odd"))
    tree = Tree(place)
    for call in (
        lambda: tree.open("odd"),
        lambda: tree.read("odd", 9),
        lambda: tree.size("odd"),
        lambda: tree.update("odd", os.O_RDWR),
        lambda: tree.copy_from(tree, "odd", 9),
        lambda: tree.move("odd", tree, "new"),
    ):
        with pytest.raises(DamagedError, match=r"is a (pipe|socket|folder), not a file"):
            call()
    assert not tree.holds("odd") and "odd" not in [listed.name for listed in tree.files()]


def test_a_device_is_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening some does something already."""
    opened: list[str] = []
    real = os.open

    def watching(path: str, *rest: int, **options: int) -> int:
        opened.append(str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", watching)
    with pytest.raises(DamagedError, match="is a device"):
        Tree(Path("/dev")).open("zero")
    assert "zero" not in opened


def test_what_is_parsed_is_bounded(place: Path) -> None:
    """A sparse terabyte costs nothing to make, and nothing to refuse."""
    with (place / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="too large"):
        Tree(place).read("sparse", 1 << 20)


READ_THROUGH: dict[str, Callable[[Tree, int], object]] = {
    "chunks": lambda tree, limit: next(tree.chunks("sparse", limit)),
    "copy": lambda tree, limit: tree.below("new").copy_from(tree, "sparse", limit),
    "sha256": lambda tree, limit: hash_file(tree, "sparse", limit),
}


@pytest.mark.parametrize("how", READ_THROUGH)
def test_what_is_read_through_is_bounded(how: str, place: Path) -> None:
    """Whoever reads a whole file says how large it may be: of a larger one nothing is read, and nothing made."""
    with (place / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    tree = Tree(place)
    with pytest.raises(DamagedError, match=r"sparse: has 1099511627776 bytes, more than the 1048576 that it may have"):
        READ_THROUGH[how](tree, 1 << 20)
    assert not (place / "new").exists()
    (place / "sparse").write_bytes(b"xy")
    READ_THROUGH[how](tree, 2)


def test_a_file_that_is_somebody_else_s_too(place: Path) -> None:
    os.link(place.parent / "victim", place / "x")
    tree = Tree(place)
    for call in (
        lambda: tree.read("x", 9, sole=True),
        lambda: tree.open("x", sole=True),
        lambda: tree.check_sole("x"),
    ):
        with pytest.raises(UsageError, match=r"x: has a second name elsewhere \(a hard link\)"):
            call()
    assert tree.read("x", 9) == b"precious" and tree.read("file", 9, sole=True) == b"ours"


def test_a_link_out_of_a_folder_of_the_folder(place: Path) -> None:
    """What lies in `sub` may not lead to what is beside it, whether or not that may be copied."""
    (place / "sub" / "x").symlink_to("../file")
    (place / "sub" / "y").symlink_to("../.git/config")
    for name in ("x", "y"):
        with pytest.raises(UsageError, match="is a link out of the folder"):
            Tree(place).below("sub").read(name, 9)
    assert Tree(place).read("sub/x", 9) == b"ours"


def test_a_new_file_follows_the_umask_and_replaces_what_was_there(place: Path) -> None:
    old = os.umask(0o027)
    try:
        Tree(place).write("a/b/c", b"1")
        Tree(place).write("a/b/c", b"2")
    finally:
        os.umask(old)
    path = place / "a" / "b" / "c"
    assert path.read_bytes() == b"2" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_no_descriptor_is_left(place: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    tree = Tree(place)
    (place / "link").symlink_to("../victim")
    for call in (
        lambda: tree.read("file", 9),
        lambda: tree.read("link", 9),
        lambda: tree.read("sub", 9),
        lambda: tree.read("missing/x", 9),
        lambda: tree.write("file/x", b""),
        tree.files,
        tree.names,
        lambda: tree.sync(),
    ):
        with suppress(XpuquantError, OSError):
            call()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_what_is_hidden() -> None:
    assert all(map(is_hidden, (".git/config", "a/.env", "__pycache__/x.pyc", ".cache/x", ".gitattributes")))
    assert not any(map(is_hidden, ("config.json", "a.b/c", "sub/x.py")))


# Nobody else opens paths

DOOR = ("convert/tree.py", "convert/walk.py")
ELSEWHERE = {
    "convert/cli/encoding.py": "the null device, where a standard stream is closed",
    "convert/doctor.py": "devices of this machine, below /dev and /sys",
    "convert/report/page.py": "a template of this package",
    "convert/verify/setting.py": "the processor's name, in /proc",
}
"""Module → what it opens, which is no file of a source or an output."""

OPENING = {
    *("open", "read_bytes", "read_text", "write_bytes", "write_text", "touch", "copyfile", "copytree", "copy", "copy2"),
    *(
        "unlink",
        "remove",
        "rmdir",
        "rmtree",
        "rename",
        "move",
        "symlink_to",
        "hardlink_to",
        "mkdir",
        "makedirs",
        "truncate",
    ),
    *(
        "iterdir",
        "glob",
        "rglob",
        "walk",
        "scandir",
        "listdir",
        "readlink",
        "utime",
        "chmod",
        "memmap",
        "fromfile",
        "tofile",
    ),
}
"""Functions of os, shutil, pathlib, builtins and numpy that reach a file by its path."""

OURS = {"open", "remove", "move", "read_text"}
"""Methods of Tree, Source and Target that are called like one of them: told apart by what they are called on."""

ON = {"tree", "files", "out", "_tree", "_out", "target", "source", "staging"}

ALLOWED = {
    "convert/runs/little_disk.py: out.rmdir": "the folder that the user named, where nothing is left in it",
    "convert/hub/publish.py: rename": "a card's model, in its text",
    "convert/sources/streamed.py: ?.copy": "an array",
    "convert/sources/open.py: parent.iterdir": "names beside a folder that the user named, to say which was meant",
    "convert/runs/several.py: ?.open": "the list of sources that the user named: neither a source nor an output",
    "convert/write/resumption.py: digest.copy": "a digest, as it stands",
    "convert/verify/contents.py: copies.remove": "of a tree",
    "convert/verify/foreign.py: os.scandir": "names alone: nothing is opened, no link followed",
    "convert/verify/exactness.py: read_bytes": "those of a tensor",
}
"""Call → what it is."""


def openings(module: ast.Module) -> Iterator[str]:
    """Calls that may open a path, each as what it is called on and its name."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in OPENING - {"copy", "read_text", "remove", "move"}:
            yield function.id
        if isinstance(function, ast.Attribute) and function.attr in OPENING:
            on = function.value
            last = on.attr if isinstance(on, ast.Attribute) else on.id if isinstance(on, ast.Name) else "?"
            if not (function.attr in OURS and last in ON):
                yield f"{last}.{function.attr}"


def test_no_other_module_opens_paths() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "convert").rglob("*.py"))
        for name in openings(ast.parse(path.read_text()))
        if str(path.relative_to(ROOT)) not in (*DOOR, *ELSEWHERE)
    }
    assert found == ALLOWED.keys()


def test_the_rule_sees_what_it_forbids() -> None:
    bad = "open(x)\nPath(x).read_bytes()\nos.open(x, 0)\nshutil.rmtree(x)\n(out / name).unlink()\nnp.memmap(x)\n"
    assert len(list(openings(ast.parse(bad)))) == 6
    for path in ELSEWHERE:
        assert list(openings(ast.parse((ROOT / path).read_text()))), f"{path} needs no exception"
