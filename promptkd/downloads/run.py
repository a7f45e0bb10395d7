"""Complete items one after the other: list, check the disk, fetch, convert, move into place."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from promptkd.downloads.catalog import MANIFEST, Item, state
from promptkd.downloads.conversion import convert
from promptkd.downloads.hub import FULL_DISK, HubError, Unreachable, fetch
from promptkd.downloads.plan import Plan, make_plan
from promptkd.errors import UserError
from promptkd.utils.files import remove, try_lock, write_json
from promptkd.utils.format import format_bytes
from promptkd.weights.torch_files import RefusedError


def download(items: list[Item], base: Path) -> int:
    """Complete every item, and report at the end what failed.

    Args:
        items: Rows of the catalog.
        base: The folder that holds all items.

    Returns:
        The number of items that failed.

    Raises:
        UserError: If the hub does not answer or the disk is too small. Then nothing has been written.
    """
    items = _drop_items_without_repository(items, base)
    failures: dict[str, str] = {}
    plans = _plan_all(items, base, failures)
    check_disk(plans)
    for number, plan in enumerate(plans, 1):
        item = plan.item
        size = format_bytes(plan.missing_bytes())
        print(f"[{number}/{len(plans)}] {item.key}: {size} of {item.repo} -> {item.target}", flush=True)
        try:
            check_disk([plan])
            complete(plan)
        except (UserError, OSError) as error:
            failures[item.key] = _reason(error)
            print(f"  failed: {failures[item.key]}", flush=True)
    present = sum(state(item, base) == "present" for item in items)
    hint = "; run the same command again to try the rest" if failures else ""
    print(f"{present} of {len(items)} items are complete{hint}", flush=True)
    for key, reason in failures.items():
        print(f"failed: {key}: {reason}", file=sys.stderr)
    return len(failures)


def _drop_items_without_repository(items: list[Item], base: Path) -> list[Item]:
    """Say where the files of items without a repository belong, and return the other items."""
    notes = [
        f"{item.key}: {item.target}: {item.note}"
        for item in items
        if item.repo is None and state(item, base) == "missing"
    ]
    if notes and len(notes) == len(items):
        raise UserError("; ".join(notes))
    for note in notes:
        print(note, flush=True)
    return [item for item in items if item.repo is not None]


def _plan_all(items: list[Item], base: Path, failures: dict[str, str]) -> list[Plan]:
    """Plan all incomplete items. After the first request without an answer, send no other: each would time out."""
    plans: list[Plan] = []
    unreachable: Unreachable | None = None
    for item in items:
        try:
            if state(item, base) == "present":
                remove(item.staging(base))  # of a run that was killed at its very end
            else:
                if unreachable is not None:
                    raise unreachable
                plans.append(make_plan(item, base))
        except Unreachable as error:
            if not plans:
                raise UserError(
                    f"the hub {constants.ENDPOINT} cannot be reached ({error}): set HF_ENDPOINT to a mirror or "
                    "HTTPS_PROXY to your proxy; or HF_HUB_OFFLINE=1 to use this machine's hub cache; or put the files "
                    f"of {item.repo} into {item.target} by hand (--list names all repositories and folders)"
                ) from None
            unreachable = error
            failures[item.key] = _reason(error)
        except (UserError, OSError) as error:
            doubt = " (the name is unverified)" if item.unverified else ""
            failures[item.key] = f"{_reason(error)}{doubt}"
    return plans


def check_disk(plans: list[Plan]) -> None:
    """Check that the plans fit on every disk that they write to.

    Raises:
        UserError: If one disk is too small.
    """
    disks: dict[int, tuple[Path, list[Plan]]] = {}
    for plan in plans:
        folder = next(folder for folder in plan.staging.parents if folder.is_dir())
        disks.setdefault(folder.stat().st_dev, (folder, []))[1].append(plan)
    for folder, group in disks.values():
        # Pickle files are removed when their item is complete, so only the largest of them counts twice.
        need = sum(plan.missing_bytes() for plan in group) + max(plan.conversion_bytes() for plan in group)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"{format_bytes(need)} are needed and {format_bytes(free)} are free on the disk of {folder}: choose "
                "fewer items with --only, make room, or make the folder a link to a larger disk"
            )


def complete(plan: Plan) -> None:
    """Fetch an item's missing files, convert its pickle files and move all into place. May be stopped at any time."""
    with locked(plan.item, plan.staging):
        remove(plan.staging / ".cache")  # the library's, with incomplete files of a killed run
        for name, file in plan.files.items():
            if name not in plan.existing:
                fetch(plan.listing, file, plan.staging)
        paths = {name: plan.find(name) for name in plan.files if name not in plan.outputs}
        if plan.pickles:
            _convert(plan)
            paths |= {name: plan.staging / name for name in plan.outputs.values()}
        publish(plan, paths)


def _convert(plan: Plan) -> None:
    print(f"  converting {', '.join(plan.pickles)} to safetensors", flush=True)
    try:
        convert([plan.find(name) for name in plan.pickles], plan.find("config.json"), plan.staging)
    except RefusedError as error:
        if error.path.parent == plan.staging:
            error.path.unlink()  # so that nobody loads it
        raise


def publish(plan: Plan, paths: dict[str, Path]) -> None:
    """Move an item's files into its folder and remove the staging folder.

    The manifest is written before the files move, and names them all. So the item counts as partial until the last
    file has moved, and a later run may replace the files that have.

    Args:
        plan: The item's plan.
        paths: The item's files: name -> path, which is the final one for those that exist already.
    """
    moves = {path: plan.folder / name for name, path in paths.items() if path != plan.folder / name}
    sizes = {name: path.stat().st_size for name, path in sorted(paths.items())}
    for path in moves.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # another revision's file may have the size that the manifest says
    plan.folder.mkdir(parents=True, exist_ok=True)
    source = {"key": plan.item.key, "repo": plan.item.repo, "revision": plan.listing.revision}
    write_json(plan.folder / MANIFEST, {**source, "files": sizes})
    for path, final in moves.items():
        os.replace(path, final)
    shutil.rmtree(plan.staging)


@contextmanager
def locked(item: Item, staging: Path) -> Iterator[None]:
    """Keep other processes away from an item.

    Raises:
        HubError: If another process is downloading it.
    """
    staging.mkdir(parents=True, exist_ok=True)
    lock = try_lock(staging / ".lock")
    if lock is None:
        raise HubError(f"another process is downloading {item.target}")
    try:
        yield
    finally:
        lock.release()


def _reason(error: Exception) -> str:
    if isinstance(error, Unreachable):
        return f"the hub does not answer ({error}); complete files are kept"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "the disk is full; complete files are kept"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or error} ({error.filename})"
    return str(error)
