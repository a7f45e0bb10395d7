"""Complete items one after the other: list, check the disk, fetch, convert, move into place."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from promptkd.downloads.catalog import MANIFEST, Item, has_size, read_manifest, state
from promptkd.downloads.conversion import ConversionError, convert
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
        except (UserError, HubError, ConversionError, OSError) as error:
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
            if not _is_complete(item, base):
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
        except (HubError, OSError) as error:
            doubt = " (the name is unverified)" if item.unverified else ""
            failures[item.key] = f"{_reason(error)}{doubt}"
    return plans


def _is_complete(item: Item, base: Path) -> bool:
    """Whether an item is complete. Finish the move of a run that was stopped during it."""
    staging = item.staging(base)
    if state(item, base) != "present" and read_manifest(staging) is not None:
        with locked(item, staging):
            publish(staging, item.folder(base))
    present = state(item, base) == "present"
    if present and staging.exists():
        shutil.rmtree(staging)
    return present


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
        scratch = plan.staging / ".hub"
        remove(scratch)  # incomplete files of a killed run
        for name, file in plan.files.items():
            if name not in plan.existing:
                fetch(plan.listing, file, plan.staging / name, scratch)
        names = set(plan.files)
        if plan.pickles:
            print(f"  converting {', '.join(plan.pickles)} to safetensors", flush=True)
            sources = [plan.find(name) for name in plan.pickles]
            try:
                written = convert(sources, plan.find("config.json"), plan.staging)
            except RefusedError as error:
                if error.path.parent == plan.staging:
                    error.path.unlink()  # so that nobody loads it
                raise
            names = names - set(plan.pickles) - {"pytorch_model.bin.index.json"} | set(written)
            plan.existing.difference_update(written)
        sizes = {name: plan.find(name).stat().st_size for name in sorted(names)}
        manifest = {
            "key": plan.item.key,
            "repo": plan.item.repo,
            "revision": plan.listing.revision,
            "files": sizes,
        }
        write_json(plan.staging / MANIFEST, manifest)
        publish(plan.staging, plan.folder)


def publish(staging: Path, folder: Path) -> None:
    """Move the files that the manifest in `staging` names into `folder`, the manifest last, and remove `staging`.

    May be stopped and called again. If a file is in neither folder, only the manifest is removed.
    """
    sizes = read_manifest(staging) or {}
    staged = [name for name in sizes if has_size(staging / name, sizes[name])]
    if not all(name in staged or has_size(folder / name, sizes[name]) for name in sizes):
        (staging / MANIFEST).unlink()
        return
    for name in [*staged, MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    shutil.rmtree(staging)


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
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return " ".join(str(error).split())
