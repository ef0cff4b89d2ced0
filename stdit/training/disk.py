"""Write files of a run so that a full disk ends it with a clear error and leaves nothing half written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stdit.errors import UserError
from stdit.umask import apply_umask


def disk_advice(error: Exception) -> str:
    """Return what a user can do about a disk that cannot be written."""
    codes = (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
    if isinstance(error, OSError) and error.errno in codes:
        return "check that the folder exists and is writable"
    return "make room on the disk"


@contextmanager
def disk_errors(what: str, aside: Path) -> Iterator[None]:
    """Turn disk errors in a block into a UserError; after any error remove ``aside``, a folder or a file.

    Args:
        what: name of what is written, for the message.
    """
    from safetensors import SafetensorError

    try:
        yield
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # none, or a folder that could not be removed: the first error says why
            aside.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"{what} could not be written ({error}); what was there before is unchanged: {disk_advice(error)} "
                "and run the same command again."
            ) from error
        raise


def folders_beside(folder: Path) -> tuple[Path, Path]:
    """Return the folders that `replace_folder` uses beside one, and removes: for the new one, for the old one."""
    return folder.parent / f"{folder.name}.tmp", folder.parent / f"{folder.name}.old"


@contextmanager
def replace_folder(what: str, folder: Path, parents: bool = False) -> Iterator[Path]:
    """Yield a new folder to write into; rename it to ``folder`` at the end, in place of an older one.

    Args:
        what: name of what is written, for messages.
        parents: create missing parent folders. Not in a run folder: if that has vanished, it must not reappear
            without the rest.
    """
    aside, old = folders_beside(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with disk_errors(what, aside):
        aside.mkdir(parents=parents)
        yield aside
        apply_umask(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
