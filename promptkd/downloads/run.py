"""Make items complete, one after the other: ask, check the disk, fetch, convert, move into place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from promptkd.downloads.hub import Hub, HubError, LocalCache, Unreachable, open_source
from promptkd.downloads.plan import Plan, make_plan
from promptkd.downloads.safe_weights import WeightsError, convert
from promptkd.downloads.table import MANIFEST, Item, has_size, human, read_manifest, state
from promptkd.errors import UserError
from promptkd.pickled_weights import RefusedError


def download(items: list[Item], base: Path) -> int:
    """Make every item complete; what cannot be had is told at the end. Returns how many that were.

    Raises UserError, with nothing written, for a hub out of reach and for a disk that is too small."""
    items = _without_bring_your_own(items, base)
    source = open_source()
    failures: dict[str, str] = {}
    plans = _plan_all(items, base, source, failures)
    check_disk(plans)
    for number, plan in enumerate(plans, 1):
        item = plan.item
        size = human(plan.missing_bytes())
        print(f"[{number}/{len(plans)}] {item.key}: {size} of {item.repo} -> {item.target}", flush=True)
        try:
            check_disk([plan])
            obtain(plan, source)
        except (UserError, HubError, WeightsError, OSError) as error:
            failures[item.key] = _reason(error)
            print(f"  failed: {failures[item.key]}", flush=True)
    complete = sum(state(item, base) == "present" for item in items)
    again = "; the same command run again tries the rest" if failures else ""
    print(f"{complete} of {len(items)} items are complete{again}", flush=True)
    for key, reason in failures.items():
        print(f"failed: {key}: {reason}", file=sys.stderr)
    return len(failures)


def _without_bring_your_own(items: list[Item], base: Path) -> list[Item]:
    """Leave out what no hub gives, and say where it belongs. Raises UserError if that is all there was."""
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


def _plan_all(items: list[Item], base: Path, source: Hub | LocalCache, failures: dict[str, str]) -> list[Plan]:
    """Plans for what is not complete. Once a question is not answered no other is asked: each would wait its time."""
    plans: list[Plan] = []
    gone: Unreachable | None = None
    for item in items:
        try:
            if not _is_complete(item, base):
                if gone is not None:
                    raise gone
                plans.append(make_plan(item, base, source))
        except Unreachable as error:
            if not plans:
                raise UserError(_out_of_reach(item, str(error))) from None
            gone = error
            failures[item.key] = _reason(error)
        except (HubError, OSError) as error:
            doubt = " (the name is unverified)" if item.unverified else ""
            failures[item.key] = f"{_reason(error)}{doubt}"
    return plans


def _is_complete(item: Item, base: Path) -> bool:
    """Whether all is there. Does the last move where a run was stopped before it, and clears up after it."""
    staging = item.staging(base)
    if state(item, base) != "present" and read_manifest(staging) is not None:
        with _locked(item, staging):
            publish(staging, item.folder(base))
    present = state(item, base) == "present"
    if present and staging.exists():
        shutil.rmtree(staging)
    return present


def _out_of_reach(item: Item, why: str) -> str:
    return (
        f"the hub {constants.ENDPOINT} cannot be reached ({why}): set HF_ENDPOINT to a mirror or HTTPS_PROXY "
        "to your proxy; or HF_HUB_OFFLINE=1 to take what this machine's hub cache holds; or put the files of "
        f"{item.repo} into {item.target} by hand (--list names all repositories and folders)"
    )


def check_disk(plans: list[Plan]) -> None:
    """Raise UserError if the plans need more than is free, on any of the disks that they write to."""
    disks: dict[int, tuple[Path, list[Plan]]] = {}
    for plan in plans:
        place = next(folder for folder in plan.staging.parents if folder.is_dir())
        disks.setdefault(place.stat().st_dev, (place, []))[1].append(plan)
    for place, here in disks.values():
        # Pickle files go when their item is done: only the largest of them counts twice.
        need = sum(plan.missing_bytes() for plan in here) + max(plan.conversion_bytes() for plan in here)
        free = shutil.disk_usage(place).free
        if need > free:
            raise UserError(
                f"{human(need)} are needed and {human(free)} are free on the disk of {place}: choose fewer "
                "items with --only, make room, or make the folder a link to a larger disk"
            )


def obtain(plan: Plan, source: Hub | LocalCache) -> None:
    """Fetch what one item lacks, convert its pickle files, put it in place. May be stopped anywhere."""
    with _locked(plan.item, plan.staging):
        for name, file in plan.files.items():
            if name not in plan.here:
                source.fetch(plan.listing, file, plan.staging / name)
        names = set(plan.files)
        if plan.pickles:
            print(f"  converting {', '.join(plan.pickles)} to safetensors", flush=True)
            sources = [plan.find(name) for name in plan.pickles]
            try:
                written = convert(sources, plan.find("config.json"), plan.staging)
            except RefusedError as error:
                if error.path.parent == plan.staging:
                    error.path.unlink()  # not kept for anybody to load
                raise
            names = names - set(plan.pickles) - {"pytorch_model.bin.index.json"} | set(written)
            plan.here.difference_update(written)
        sizes = {name: plan.find(name).stat().st_size for name in sorted(names)}
        _write_manifest(plan, sizes)
        publish(plan.staging, plan.folder)


def _write_manifest(plan: Plan, sizes: dict[str, int]) -> None:
    manifest = {
        "key": plan.item.key,
        "repo": plan.item.repo,
        "revision": plan.listing.revision,
        "files": sizes,
    }
    unfinished = plan.staging / f"{MANIFEST}.part"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, plan.staging / MANIFEST)


def publish(staging: Path, folder: Path) -> None:
    """Move the files that the manifest in `staging` names into `folder`, the manifest last; remove the rest.

    May be stopped and called again; only drops the manifest if a file is in neither place."""
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
def _locked(item: Item, staging: Path) -> Iterator[None]:
    """Keep a second run away from the same item. Where the file system has no locks, nobody is kept away."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"another run is at work on {item.target}") from None
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, Unreachable):
        return f"the hub does not answer ({error}); what came is kept"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; what came is kept"
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return " ".join(str(error).split())
