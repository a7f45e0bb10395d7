"""Folders that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from promptkd.errors import UserError


@contextlib.contextmanager
def written_together(save: Path) -> Iterator[Path]:
    """A temporary folder inside `save`; without an error its files move to `save` at the end, else all vanish."""
    made = [folder for folder in (save, *save.parents) if not folder.exists()]
    done = False
    try:
        save.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=save))
        try:
            yield staging
            files = sorted(staging.iterdir())
            for file in files:
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            for file in files:
                os.replace(file, save / file.name)
            done = True
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or save}: cannot be written: {error.strerror}") from None
    finally:
        if not done:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
