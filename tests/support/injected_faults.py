"""Ways a converted repo can be wrong, each done to a folder by a few bytes.

Knows safetensors files only by their definition: nothing of the package is used, so that a mistake there cannot hide.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Repo:
    """A converted folder, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, int, int, str, list[int]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            header, start = read_header(file)
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    self.places[name] = (file, start + begin, end - begin, entry["dtype"], entry["shape"])

    def find(self, *suffixes: str) -> str | None:
        """The first tensor with one of the suffixes."""
        ends = tuple(f".{suffix}" for suffix in suffixes)
        return next((name for name in sorted(self.places) if name.endswith(ends)), None)

    def read(self, name: str) -> Array:
        file, at, size, _, _ = self.places[name]
        return np.frombuffer(file.read_bytes()[at : at + size], np.uint8).copy()

    def write(self, name: str, data: Array) -> None:
        file, at, size, _, _ = self.places[name]
        content = bytearray(file.read_bytes())
        assert data.nbytes == size
        content[at : at + size] = data.tobytes()
        file.write_bytes(content)

    def shape(self, name: str) -> list[int]:
        return self.places[name][4]

    def relabel(self, name: str, dtype: str | None = None, shape: list[int] | None = None) -> None:
        file = self.places[name][0]
        header, start = read_header(file)
        header[name]["dtype"] = dtype or header[name]["dtype"]
        header[name]["shape"] = shape or header[name]["shape"]
        write_header(file, header, file.read_bytes()[start:])

    def json(self, name: str, edit: Callable[[dict[str, Any]], object]) -> bool:
        path = self.folder / name
        if not path.exists():
            return False
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value, indent=2) + "\n")
        return True


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def is_readable(file: Path) -> bool:
    """Whether a file can be read whole by who damages it: no pipe, which would wait for ever, no sparse terabyte."""
    return file.is_file() and file.stat().st_size < 1 << 30


def reseal(folder: Path) -> None:
    """Record the sha256 of the damaged files, as a converter that wrote them so would have."""
    path = folder / "xpuquant.json"
    record = json.loads(path.read_text())
    for table, of in (("shards", lambda e: e), ("files", None)):
        for name in list(record[table]):
            file = folder / name
            if not is_readable(file):
                continue
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if of is None:
                record[table][name] = digest
            else:
                record[table][name]["sha256"] = digest
    record["sha256"] = "0" * 64
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    record_digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, record_digest, 1))


Fault = Callable[[Repo], bool]
"""Does the damage; False where the repo has nothing to damage so."""


def _flip(*suffixes: str, at: float = 0.5, mask: int = 0x10) -> Fault:
    def fault(repo: Repo) -> bool:
        name = repo.find(*suffixes)
        if name is None:
            return False
        data = repo.read(name)
        data[int(len(data) * at)] ^= mask
        repo.write(name, data)
        return True

    return fault


def _all(mask: int, *suffixes: str) -> Fault:
    def fault(repo: Repo) -> bool:
        name = repo.find(*suffixes)
        if name is None:
            return False
        repo.write(name, repo.read(name) ^ np.uint8(mask))
        return True

    return fault


def _transposed(*suffixes: str) -> Fault:
    def fault(repo: Repo) -> bool:
        name = repo.find(*suffixes)
        if name is None or len(repo.shape(name)) < 2 or min(repo.shape(name)[-2:]) < 2:
            return False
        rows, columns = repo.shape(name)[-2:]
        grid = repo.read(name).reshape(-1, rows, columns, repo.places[name][2] // int(np.prod(repo.shape(name))))
        before = repo.read(name)
        after = np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(-1)
        repo.write(name, after)
        return not np.array_equal(before, after)

    return fault


def _halves_swapped(*suffixes: str) -> Fault:
    """Gate and up exchanged: two halves of a stack, or two linears of the same shape."""

    def fault(repo: Repo) -> bool:
        done = False
        for suffix in suffixes:
            name = repo.find(suffix)
            if name is None:
                continue
            E, rows = repo.shape(name)[:2]
            halves = repo.read(name).reshape(E, 2, -1)
            repo.write(name, np.ascontiguousarray(halves[:, ::-1]).reshape(-1))
            done = rows > 1
        return done

    return fault


def gate_and_up_exchanged(repo: Repo) -> bool:
    pairs = [(name, name.replace("gate_proj", "up_proj")) for name in repo.places if ".gate_proj." in name]
    for gate, up in pairs:
        one, other = repo.read(gate), repo.read(up)
        repo.write(gate, other)
        repo.write(up, one)
    return bool(pairs)


def columns_swapped(repo: Repo) -> bool:
    """Gate and up of transposed stacks `[E, K, 2I]`."""
    name = repo.find("experts.gate_up_proj")
    if name is None or repo.places[name][3] == "U8":
        return False
    halves = repo.read(name).reshape(*repo.shape(name)[:2], 2, -1)
    repo.write(name, np.ascontiguousarray(halves[:, :, ::-1]).reshape(-1))
    return True


def experts_exchanged(repo: Repo) -> bool:
    name = repo.find("experts.down_proj")
    if name is None:
        return False
    data = repo.read(name).reshape(repo.shape(name)[0], -1)
    data[[0, 1]] = data[[1, 0]]
    repo.write(name, data.reshape(-1))
    return True


def order_shifted(repo: Repo) -> bool:
    name = repo.find("g_idx")
    if name is not None:
        repo.write(name, np.roll(repo.read(name).view(np.int32), 1).view(np.uint8))
    return name is not None


def scales_of_the_neighbour_group(repo: Repo) -> bool:
    """Each group with the scale of the one before."""
    name = repo.find(*_SCALES)
    if name is None or len(repo.shape(name)) < 2:
        return False
    axis = -2 if name.endswith(".scales") else -1
    before = repo.read(name)
    values = before.reshape(*repo.shape(name), -1)
    after = np.ascontiguousarray(np.roll(values, 1, axis=axis - 1)).reshape(-1)
    repo.write(name, after)
    return not np.array_equal(before, after)


def rows_rolled(repo: Repo) -> bool:
    name = repo.find("qweight", "weight_scale", "experts.down_proj")
    name = repo.find("qweight", "experts.down_proj") or (name and name.removesuffix("_scale"))
    if name is None:
        return False
    rows = int(np.prod(repo.shape(name)[:-1]))
    repo.write(name, np.roll(repo.read(name).reshape(rows, -1), 1, axis=0).reshape(-1))
    return True


def scale_relabelled(repo: Repo) -> bool:
    name = repo.find("scales", "gate_up_proj_scale", "weight_scale")
    swapped = {"F16": "BF16", "BF16": "F16"}
    if name is None or repo.places[name][3] not in swapped:
        return False
    repo.relabel(name, swapped[repo.places[name][3]])
    return True


def element_relabelled(repo: Repo) -> bool:
    name = repo.find("weight", "experts.down_proj")
    names = [n for n in repo.places if repo.places[n][3] == "F8_E4M3"]
    if name is None or not names:
        return False
    repo.relabel(names[0], "F8_E5M2")
    return True


def shape_relabelled(repo: Repo) -> bool:
    name = repo.find("qweight", "experts.down_proj", "weight_scale")
    if name is None or len(repo.shape(name)) < 2:
        return False
    shape = list(repo.shape(name))
    shape[-2:] = [shape[-2] // 2, shape[-1] * 2]
    repo.relabel(name, shape=shape)
    return shape[-2] > 0


def shard_truncated(repo: Repo) -> bool:
    file = sorted(repo.folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-8])
    return True


def shard_missing(repo: Repo) -> bool:
    sorted(repo.folder.glob("*.safetensors"))[-1].unlink()
    return True


def shard_added(repo: Repo) -> bool:
    write_header(
        repo.folder / "extra.safetensors",
        {"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        bytes(4),
    )
    return True


def tensor_added(repo: Repo) -> bool:
    file = sorted(repo.folder.glob("*.safetensors"))[-1]
    header, start = read_header(file)
    data = file.read_bytes()[start:]
    header["stray.weight"] = {"dtype": "U8", "shape": [8], "data_offsets": [len(data), len(data) + 8]}
    write_header(file, header, data + bytes(8))
    index = repo.folder / "model.safetensors.index.json"
    if index.exists():
        repo.json(index.name, lambda value: value["weight_map"].update({"stray.weight": file.name}))
    return True


def tensor_renamed(repo: Repo) -> bool:
    name = repo.find("scales", "weight_scale", "gate_up_proj_scale")
    if name is None:
        return False
    file = repo.places[name][0]
    header, start = read_header(file)
    header[f"{name}x"] = header.pop(name)
    write_header(file, header, file.read_bytes()[start:])
    return True


def index_edited(repo: Repo) -> bool:
    def move(index: dict[str, Any]) -> None:
        table = index["weight_map"]
        first = next(iter(table))
        table[first] = next(shard for shard in table.values() if shard != table[first])

    return repo.json("model.safetensors.index.json", move)


def index_without_a_tensor(repo: Repo) -> bool:
    return repo.json("model.safetensors.index.json", lambda index: index["weight_map"].popitem())


def _config(edit: Callable[[dict[str, Any]], object]) -> Fault:
    return lambda repo: repo.json("config.json", lambda config: edit(config["quantization_config"]["schemes"][0]))


def config_group_size(repo: Repo) -> bool:
    def edit(scheme: dict[str, Any]) -> None:
        scheme["group_size"] = scheme["group_size"] * 2 or 64

    return _config(edit)(repo)


def config_granularity(repo: Repo) -> bool:
    other = {"group": "channel", "tensor": "channel", "channel": "tensor", "block": "channel"}
    return _config(lambda scheme: scheme.update(granularity=other[scheme["granularity"]]))(repo)


def config_divides(repo: Repo) -> bool:
    """A factor for a divisor, or the other way round."""
    if repo.find("global_scale", "down_proj_global_scale") is None:
        return False
    return _config(lambda scheme: scheme.update(divides=not scheme.get("divides", False)))(repo)


def config_without_a_module(repo: Repo) -> bool:
    return _config(lambda scheme: scheme["modules"].pop())(repo)


def config_scale_dtype(repo: Repo) -> bool:
    return _config(lambda scheme: scheme.update(scale_dtype="F16" if scheme["scale_dtype"] != "F16" else "F32"))(repo)


def _file(name: str, at: float = 0.5) -> Fault:
    def fault(repo: Repo) -> bool:
        path = repo.folder / name
        if not path.exists():
            return False
        content = bytearray(path.read_bytes())
        content[int(len(content) * at)] ^= 1
        path.write_bytes(content)
        return True

    return fault


_SCALES = ("scales", "gate_up_proj_scale", "weight_scale")
_CODES = ("qweight", "experts.gate_up_proj")

FAULTS: dict[str, Fault] = {
    "one nibble of a linear": _flip("qweight"),
    "one code of an expert": _flip("experts.gate_up_proj"),
    "one code, fp8 or mxfp4 linear": _flip("q_proj.weight"),
    "lowest bit of one scale": _flip(*_SCALES, mask=0x01),
    "one zero point": _flip("qzeros"),
    "one zero point of an expert": _flip("gate_up_proj_zero_point", mask=0x01),
    "one bias of an expert": _flip("down_proj_bias", mask=0x80),
    "static activation scale": _flip("input_scale", mask=0x01),
    "one unquantized value": _flip("norm.weight", mask=0x01),
    "gate and up linears exchanged": gate_and_up_exchanged,
    "gate and up of experts exchanged": _halves_swapped("experts.gate_up_proj", "experts.gate_up_proj_scale"),
    "gate and up columns exchanged": columns_swapped,
    "two experts exchanged": experts_exchanged,
    "global scale, lowest bit": _flip("global_scale", "down_proj_global_scale", at=0, mask=0x01),
    "scales of the neighbour group": scales_of_the_neighbour_group,
    "g_idx shifted by one": order_shifted,
    "s4 and u4 exchanged": _all(0x88, *_CODES),
    "zero points one too small": _all(0x11, "qzeros"),
    "zero points of experts one off": _all(0x01, "gate_up_proj_zero_point"),
    "zero points of experts transposed": _transposed("gate_up_proj_zero_point"),
    "scales transposed": _transposed(*_SCALES),
    "rows rolled by one": rows_rolled,
    "scale dtype relabelled": scale_relabelled,
    "fp8 type relabelled": element_relabelled,
    "shape relabelled": shape_relabelled,
    "shard truncated": shard_truncated,
    "shard missing": shard_missing,
    "stray shard": shard_added,
    "stray tensor": tensor_added,
    "tensor renamed": tensor_renamed,
    "index: tensor in another shard": index_edited,
    "index: tensor not listed": index_without_a_tensor,
    "config: group size": config_group_size,
    "config: granularity": config_granularity,
    "config: global scale inverted": config_divides,
    "config: a module not named": config_without_a_module,
    "config: scale dtype": config_scale_dtype,
}

UNSEALABLE: dict[str, Fault] = {
    "one bit of xpuquant.json": _file("xpuquant.json"),
    "one bit of config.json": _file("config.json"),
    "one bit of a tokenizer file": _file("tokenizer.json"),
    "one bit of verify.json": _file("verify.json"),
    "one bit of verify.html": _file("verify.html"),
}
"""Changes that only a sha256 shows."""


@dataclass
class Table:
    """fault → what caught it, in each way of looking; the worst case over the checkpoints."""

    rows: dict[str, list[set[str]]] = field(default_factory=dict)

    def add(self, fault: str, caught: list[set[str]]) -> None:
        held = self.rows.setdefault(fault, [set(one) for one in caught])
        for mine, new in zip(held, caught, strict=True):
            mine &= new

    def markdown(self) -> Iterator[str]:
        for fault, caught in self.rows.items():
            yield f"| {fault} | " + " | ".join(", ".join(sorted(one)) or "–" for one in caught) + " |"


def copy(source: Path, target: Path) -> Repo:
    shutil.copytree(source, target)
    return Repo(target)
