"""The catalog of downloads (configs/downloads.json): its items, a selection of them, and their state on disk."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from promptkd.errors import UserError
from promptkd.utils.format import format_bytes
from promptkd.utils.strict_json import check_kind, is_kind, read_object

ROW = {"key": str, "repo": (str, None), "type": str, "target": str, "bytes": (int, None), "licence": (str, None)}
OPTIONAL = {"unverified": bool, "note": str, "subfolder": str, "needs": [str]}
OPTIONAL_DEFAULTS = {"unverified": False, "note": "", "subfolder": "", "needs": []}
MANIFEST = ".download.json"  # lists the files of a downloaded item and their sizes


@dataclass(frozen=True)
class Item:
    """One row of the catalog."""

    key: str
    repo: str | None  # None: users must get the files themselves
    kind: str  # "model" or "dataset", as the hub says
    target: PurePosixPath  # folder below the base path
    size: int | None  # approximate bytes, None if unknown
    licence: str | None
    unverified: bool = False
    note: str = ""
    subfolder: str = ""  # only this part of the repository
    needs: tuple[str, ...] = ()  # files that the scripts read

    @property
    def family(self) -> str | None:
        """The model family, or None for data."""
        return self.target.parts[1] if self.kind == "model" else None

    def folder(self, base: Path) -> Path:
        """Return the item's folder. A link to another disk is followed."""
        return (base / self.target).resolve()

    def staging(self, base: Path) -> Path:
        """Return the folder that collects the files. It is next to the item's, so that moving them is a rename."""
        folder = self.folder(base)
        return folder.with_name(f".{folder.name}.download")


def load_catalog(path: Path) -> list[Item]:
    """Read all items of a catalog file.

    Raises:
        UserError: If the file is damaged, or an item leads out of the base folder.
    """
    items, remedy = [], "use the project's own configs/downloads.json"
    content = read_object(path, remedy)
    try:
        check_kind(content, {"items": [ROW]}, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    for row in content["items"]:
        row = dict(row)
        if unknown := row.keys() - ROW.keys() - OPTIONAL.keys():
            raise UserError(f"{path}: {row['key']} has {min(unknown)!r}, an unknown field: {remedy}")
        if not is_kind({**OPTIONAL_DEFAULTS, **row}, OPTIONAL):
            raise UserError(f"{path}: {row['key']} has a value of the wrong type: {remedy}")
        if not stays_below(row["target"]):
            raise UserError(f"{path}: {row['key']} goes to {row['target']!r}, out of its folder: {remedy}")
        size, kind, target = row.pop("bytes"), row.pop("type"), PurePosixPath(row.pop("target"))
        needs = tuple(row.pop("needs", ()))
        items.append(Item(kind=kind, size=size, target=target, needs=needs, **row))
    return items


def families(items: list[Item]) -> list[str]:
    """List the model families of a catalog's items, in the order of the catalog."""
    return list(dict.fromkeys(item.family for item in items if item.family))


def select(items: list[Item], only: list[str], models: list[str], data: bool) -> list[Item]:
    """Select the items that match any of the options, or all items if no option is given.

    Args:
        items: The catalog.
        only: Keys, which may hold the wildcards * and ?.
        models: Model families.
        data: Whether to include all data sets.

    Raises:
        UserError: If a key matches no item.
    """
    if not (only or models or data):
        return items
    chosen = set()
    for pattern in only:
        matches = {item.key for item in items if fnmatchcase(item.key, pattern)}
        if not matches:
            near = get_close_matches(pattern, [item.key for item in items], 1, 0)[0]
            raise UserError(f"--only {pattern}: no such item; the nearest is {near}, --list shows all")
        chosen |= matches
    return [item for item in items if item.key in chosen or item.family in models or (data and not item.family)]


def read_manifest(folder: Path) -> dict[str, int] | None:
    """Read the manifest of a complete folder: file name -> bytes. Return None if it has no readable one."""
    try:
        files = read_object(folder / MANIFEST, "download it again").get("files")
        check_kind(files, {...: int}, MANIFEST)
    except (UserError, ValueError):
        return None
    return dict(files) if files and all(map(stays_below, files)) else None


def stays_below(name: str) -> bool:
    """Whether a relative path stays inside of its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *name}


def has_size(path: Path, size: int) -> bool:
    """Whether a path is a file of `size` bytes."""
    return path.is_file() and path.stat().st_size == size


def state(item: Item, base: Path) -> str:
    """Return "present" (complete), "partial" (started, or damaged since), "by hand" (other files) or "missing"."""
    folder = item.folder(base)
    manifest = read_manifest(folder)
    if manifest and all(has_size(folder / name, size) for name, size in manifest.items()):
        return "present"
    if manifest is not None or item.staging(base).exists():
        return "partial"
    return "by hand" if folder.is_dir() and any(folder.iterdir()) else "missing"


def show(items: list[Item], base: Path) -> str:
    """Format the items and their state as a text table. Use the disk only, not the network."""
    rows: list[tuple[str, ...]] = [("KEY", "STATE", "SIZE", "REPOSITORY", "FOLDER", "LICENSE", "NOTE")]
    for item in items:
        size = format_bytes(item.size) if item.size else "?"
        repo = "/".join(filter(None, [item.repo or "-", item.subfolder]))
        note = "; ".join(filter(None, ["unverified" if item.unverified else "", item.note]))
        licence = item.licence or "not stated"
        rows.append((item.key, state(item, base), size, repo, str(item.target), licence, note))
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.rjust if head == "SIZE" else str.ljust for head in rows[0]]
    lines = ["  ".join(side(*cell) for side, cell in zip(sides, zip(row, widths))).rstrip() for row in rows]
    known = sum(item.size or 0 for item in items)
    return "\n".join([*lines, f"{len(items)} items, about {format_bytes(known)} where the size is known"])
