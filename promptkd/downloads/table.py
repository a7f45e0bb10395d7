"""The table of what can be downloaded (configs/downloads.json), what of it is wanted and what is there."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from promptkd.errors import UserError
from promptkd.strict_json import check_kind, is_kind, read_object

FAMILIES = ("gpt2", "opt", "llama")
ROW = {"key": str, "repo": (str, None), "type": str, "target": str, "bytes": (int, None), "licence": (str, None)}
OPTIONAL = {"unverified": bool, "note": str, "subfolder": str, "needs": [str]}
OPTIONAL_DEFAULTS = {"unverified": False, "note": "", "subfolder": "", "needs": []}
MANIFEST = ".download.json"  # written last into a finished folder: which files, how large


@dataclass(frozen=True)
class Item:
    """One row of the table. `size` is in bytes and approximate; None where nothing is known."""

    key: str
    repo: str | None  # None: each user must bring it
    kind: str  # "model" or "dataset", as the hub says
    target: PurePosixPath  # folder below the base path
    size: int | None
    licence: str | None
    unverified: bool = False
    note: str = ""
    subfolder: str = ""  # only this part of the repository
    needs: tuple[str, ...] = ()  # files that the scripts read

    @property
    def family(self) -> str | None:
        """gpt2, opt or llama for a model, None for data."""
        return self.target.parts[1] if self.kind == "model" else None

    def folder(self, base: Path) -> Path:
        """Where the files go; a link to another disk is followed."""
        return (base / self.target).resolve()

    def staging(self, base: Path) -> Path:
        """Where they are gathered until all are there: beside the folder, so that moving them is a rename."""
        folder = self.folder(base)
        return folder.with_name(f".{folder.name}.download")


def load_table(path: Path) -> list[Item]:
    """All rows of the table file, in its order."""
    items, remedy = [], "take the project's own configs/downloads.json"
    content = read_object(path, remedy)
    try:
        check_kind(content, {"items": [ROW]}, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    for row in content["items"]:
        row = dict(row)
        if unknown := row.keys() - ROW.keys() - OPTIONAL.keys():
            raise UserError(f"{path}: {row['key']} has {min(unknown)!r}, which nothing reads: {remedy}")
        if not is_kind({**OPTIONAL_DEFAULTS, **row}, OPTIONAL):
            raise UserError(f"{path}: {row['key']} has a value of a wrong kind: {remedy}")
        if not stays_below(row["target"]):
            raise UserError(f"{path}: {row['key']} goes to {row['target']!r}, out of its folder: {remedy}")
        size, kind, target = row.pop("bytes"), row.pop("type"), PurePosixPath(row.pop("target"))
        needs = tuple(row.pop("needs", ()))
        items.append(Item(kind=kind, size=size, target=target, needs=needs, **row))
    return items


def select(items: list[Item], only: list[str], models: list[str], data: bool) -> list[Item]:
    """The rows that any of the choices names; all rows when nothing was chosen. A key may hold * and ?."""
    if not (only or models or data):
        return items
    chosen = set()
    for pattern in only:
        matches = {item.key for item in items if fnmatchcase(item.key, pattern)}
        if not matches:
            near = get_close_matches(pattern, [item.key for item in items], 1, 0)[0]
            raise UserError(f"--only {pattern}: there is no such item; the nearest is {near}, --list shows all")
        chosen |= matches
    return [item for item in items if item.key in chosen or item.family in models or (data and not item.family)]


def read_manifest(folder: Path) -> dict[str, int] | None:
    """Sizes in bytes by file name, from the manifest of a finished folder; None without a readable one."""
    try:
        files = read_object(folder / MANIFEST, "fetch it anew").get("files")
        check_kind(files, {...: int}, MANIFEST)
    except (UserError, ValueError):
        return None
    return files if all(map(stays_below, files)) else None


def stays_below(name: str) -> bool:
    """Whether a path that a file names leads to below the folder it is taken from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *name}


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def state(item: Item, base: Path) -> str:
    """present: complete. partial: begun, or damaged since. by hand: holds what others put there."""
    folder = item.folder(base)
    manifest = read_manifest(folder)
    if manifest and all(has_size(folder / name, size) for name, size in manifest.items()):
        return "present"
    if manifest is not None or item.staging(base).exists():
        return "partial"
    return "by hand" if folder.is_dir() and any(folder.iterdir()) else "missing"


def human(size: int | None) -> str:
    """Bytes as the hub shows them, in powers of 1000."""
    if size is None:
        return "?"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def show(items: list[Item], base: Path) -> str:
    """The rows as a text table, with what is there of each. Reads the disk alone, never the network."""
    rows = [("KEY", "STATE", "SIZE", "REPOSITORY", "FOLDER", "LICENCE", "NOTE")]
    for item in items:
        note = "; ".join(filter(None, ["unverified" if item.unverified else "", item.note]))
        repo = item.repo and (f"{item.repo}/{item.subfolder}" if item.subfolder else item.repo)
        licence = item.licence or "not stated"
        target = str(item.target)
        rows.append((item.key, state(item, base), human(item.size), repo or "-", target, licence, note))
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.rjust if head == "SIZE" else str.ljust for head in rows[0]]
    lines = ["  ".join(side(*cell) for side, cell in zip(sides, zip(row, widths))).rstrip() for row in rows]
    known = sum(item.size or 0 for item in items)
    return "\n".join([*lines, f"{len(items)} items, about {human(known)} where the size is known"])
