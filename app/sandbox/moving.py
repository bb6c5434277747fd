"""Files that are moved from folder to folder, where the kernel moves none.

Landlock refuses that (EXDEV) to whom any ruleset binds that does not allow it, and one that is about signals alone, as
that of who starts these processes, cannot: it would take the mounts away that come after it. Caches of compilers write
into a folder of their own and then move what they wrote (Triton's does).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


def by_copies() -> None:
    """From now on `os.rename` and `os.replace` of this process copy a file where it cannot be moved; it then takes the
    place of the other at once, as it would."""
    for name in ("rename", "replace"):
        setattr(os, name, _copying(getattr(os, name)))


def _copying(move: Callable[..., None]) -> Callable[..., None]:
    def moved(src: Any, dst: Any, **folders: Any) -> None:
        try:
            move(src, dst, **folders)
        except OSError as error:
            if error.errno != errno.EXDEV or folders or not Path(src).is_file() or Path(src).is_symlink():
                raise
            beside = Path(f"{os.fspath(dst)}.{uuid4().hex}")
            try:
                shutil.copyfile(src, beside)
                shutil.copymode(src, beside)
                move(beside, dst)
            except OSError:
                with suppress(OSError):
                    beside.unlink()
                raise
            Path(src).unlink()

    return moved
