"""Ways to spoil one input of a folder of good ones, and the options with which each script reads that folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.training import GOLDEN

Damage = Callable[[Path], None]
SIZES = ["--max-length", "128", "--max-prompt-length", "96"]
FULL = GOLDEN / "processed/dolly/full/gpt2"
GOOD_ROW = {"instruction": "Name a token.", "input": "", "output": "alpha"}


def named(name: str, spoil: Damage) -> Damage:
    spoil.__name__ = name
    return spoil


def cut(share: float) -> Damage:
    """Keep the first bytes: a share of the file, or so many."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content)) if 0 < share < 1 else int(share)])

    return named(f"cut {share}", spoil)


def flip(place: int) -> Damage:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 0x55
        path.write_bytes(content)

    return named(f"flip {place}", spoil)


def text(content: str | bytes, name: str = "") -> Damage:
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return named(name or f"text {content[:24]!r}", lambda path: path.write_bytes(content))


def rows(*lines: Any) -> Damage:
    made = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return named(f"rows {made[-1][:24]!r}", lambda path: path.write_bytes(b"\n".join(made) + b"\n"))


def change(**values: Any) -> Damage:
    """Set keys of a JSON object; "a__b" is key b of the object at a."""

    def spoil(path: Path) -> None:
        content = json.loads(path.read_text())
        set_keys(content, values)
        path.write_text(json.dumps(content))

    return named(f"set {str(values)[:40]}", spoil)


def renamed_set(name: str) -> Damage:
    """Results whose test set has another name."""

    def spoil(path: Path) -> None:
        content = json.loads(path.read_text())
        content["sets"] = {name: content["sets"]["test"]}
        path.write_text(json.dumps(content))

    return named(f"set named {name}", spoil)


def set_keys(content: dict, values: dict[str, Any]) -> None:
    for key, value in values.items():
        *way, last = key.split("__")
        inner = content
        for part in way:
            inner = inner[part]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value


def gone(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def file_instead(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("a file")


def pipe(path: Path) -> None:
    """A named pipe: reading it would wait for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def hollow(megabytes: int) -> Damage:
    """A file of so many zeros, which takes no room on the disk."""

    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            file.truncate(megabytes << 20)

    return named(f"hollow {megabytes}", spoil)


def chat(template: Any) -> Damage:
    """A chat template in tokenizer_config.json."""
    return named(f"chat {str(template)[:40]}", change(chat_template=template))


def link(target: str) -> Damage:
    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return named(f"link to {target}", spoil)


def header(**entry: Any) -> Damage:
    """A safetensors file of one tensor whose header says `entry` of it."""
    said = {"transformer.wte.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}
    content = json.dumps(said).encode()
    return text(struct.pack("<Q", len(content)) + content + bytes(8), f"header {entry}")


def indexed(content: dict) -> Damage:
    """An index in the place of the one file of weights."""

    def spoil(path: Path) -> None:
        (path.parent / "model.safetensors").unlink()
        path.write_text(json.dumps(content))

    return named(f"index {content}", spoil)


def tensors(**values: Any) -> Damage:
    """Change tensors of a safetensors file: a function of the old one, or None to leave it out."""

    def spoil(path: Path) -> None:
        held = load_file(path)
        for name, value in values.items():
            name = next(key for key in held if key.endswith(name.replace("__", ".")))
            held[name] = value(held[name])
            if held[name] is None:
                del held[name]
        save_file(held, path, metadata={"format": "pt"})

    return named(f"tensors {list(values)}", spoil)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def forged(**values: Any) -> Damage:
    """Change state.json of a checkpoint and write the manifest that fits."""

    def spoil(path: Path) -> None:
        state = path / "state.json"
        content = json.loads(state.read_text())
        set_keys(content, values)
        state.write_text(json.dumps(content))
        sign(path)

    return named(f"forged {str(values)[:40]}", spoil)


def forged_text(content: str) -> Damage:
    def spoil(path: Path) -> None:
        (path / "state.json").write_text(content)
        sign(path)

    return named(f"forged text {content[:24]!r}", spoil)


def forged_tensors(file: str, spoil_file: Damage) -> Damage:
    def spoil(path: Path) -> None:
        spoil_file(path / file)
        sign(path)

    return named(f"forged {file} {spoil_file.__name__}", spoil)


def sign(folder: Path) -> None:
    """A manifest of whatever the folder holds."""
    files = {}
    for path in folder.iterdir():
        if path.name != "manifest.json":
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


class RunsCode:
    """Unpickled carelessly, it makes a file."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


def pickled(value: Any, name: str) -> Damage:
    return named(name, lambda path: torch.save(value, path))


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": RunsCode()}))


def zip_of(**members: bytes) -> Damage:
    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member.replace("__", "/"), content)

    return named(f"zip of {list(members)}", spoil)
