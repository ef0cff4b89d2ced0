"""Where the bytes of a clip are, and how they are opened: a local file, or a range of a local or remote one."""

import contextlib
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PROTOCOL = re.compile(r"[A-Za-z][\w+.-]+(://|::)")
EMPTY = "is empty (0 bytes)"
BLOCK_BYTES = 1 << 22
"""Most that one request to a remote file reads ahead."""


class MediaError(OSError):
    """Bytes that may not be, or cannot be, read; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class Media:
    """The bytes of one video or image: of a whole file, or `size` of them from `offset` on.

    A value without an open file: cheap to make (nothing is looked at), hashable, and picklable for worker processes.
    """

    location: str
    """Path of a local file, or a URL that fsspec opens."""
    member: str = ""
    """Name inside the archive at `location`."""
    offset: int = 0
    size: int | None = None
    """Bytes; None: to the end of the file."""
    root: str | None = None
    """Data root: a local folder (resolved) that the file has to lie in once links are followed, or a URL;
    None: it may lie anywhere."""

    @classmethod
    def of(cls, file: "Media | Path | str") -> "Media":
        """A file that the user named, wherever it lies."""
        return file if isinstance(file, Media) else cls(os.fspath(file))

    def __str__(self) -> str:
        location = without_secrets(self.location)
        return f"{location}/{self.member}" if self.member else location

    @property
    def name(self) -> str:
        """The name inside the data root, which stays when the root moves; for fingerprints."""
        full, root = str(self), self.root
        if root is None:
            return full
        root = without_secrets(root).rstrip("/") + "/"
        return full.removeprefix(root)

    @property
    def suffix(self) -> str:
        """Lower case, with its dot."""
        return posixpath.splitext(self.member or str(self))[1].lower()

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    def state(self) -> tuple[int | str, ...]:
        """What changes when the bytes do: size and time of change (of a remote file its tag), and the range.

        Raises OSError.
        """
        if self.is_remote:
            with _remote_errors():
                info = remote_info(self.location)
            found = next(
                (info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), ""
            )
            return (
                int(info.get("size") or 0),
                str(found),
                self.offset,
                -1 if self.size is None else self.size,
            )
        status = Path(self.local_path()).stat()
        return (status.st_size, status.st_mtime_ns, self.offset, -1 if self.size is None else self.size)

    def local_path(self) -> str:
        """The resolved path of a local file. Raises MediaError unless it is a file inside the root."""
        assert not self.is_remote
        try:
            path = os.path.realpath(self.location)
            if self.root is not None and not inside(path, self.root):
                raise MediaError(f"outside the data root {self.root}, where no file is opened")
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except FileNotFoundError:
            raise MediaError("file missing") from None
        except MediaError:
            raise
        except (OSError, ValueError) as error:  # a null byte, a name too long, a loop of links
            raise MediaError(f"path cannot be used: {error}") from error
        if not is_file:
            raise MediaError("file missing")
        return path

    @contextlib.contextmanager
    def opened(self) -> Iterator[str | BinaryIO]:
        """What PyAV and Pillow open: the path of a whole local file, else a file object over the range.

        Raises OSError, also for what the libraries of remote protocols raise.
        """
        if not self.is_remote and self.size is None:
            path = self.local_path()
            if os.path.getsize(path) == 0:
                raise MediaError(EMPTY)
            yield path
            return
        with self.open() as file:
            yield file

    def open(self, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
        """A file object over the bytes, from its position 0; of a remote file so many are read ahead.

        Raises OSError, as its methods do.
        """
        if self.size == 0:
            raise MediaError(EMPTY)
        if not self.is_remote:
            path = self.local_path()
            if self.size is not None and self.offset + self.size > os.path.getsize(path):
                raise MediaError(f"its archive {self.location} is cut short")
            whole: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (its owner closes it)
        else:
            with _remote_errors():
                whole = open_remote(self.location, min(self.size or block_bytes, block_bytes))
        return io.BufferedReader(_Range(whole, self.offset, self.size, self.member or self.location), 1 << 16)


class _Range(io.RawIOBase):
    """A part of an open file, which it owns, as a file that is only read."""

    def __init__(self, whole: BinaryIO, offset: int, size: int | None, name: str) -> None:
        with _remote_errors():
            self._size = whole.seek(0, os.SEEK_END) - offset if size is None else size
        self._whole, self._offset, self._place, self.name = whole, offset, 0, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}, before the first byte")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._place))
        with _remote_errors():
            self._whole.seek(self._offset + self._place)
            read = self._whole.read(wanted)
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)

    def close(self) -> None:
        if not self.closed:
            self._whole.close()
        super().close()


def is_url(location: str) -> bool:
    """Whether fsspec opens it: `s3://bucket/a.tar`, `simplecache::https://...`."""
    return PROTOCOL.match(location) is not None


def inside(path: str, root: str) -> bool:
    """Whether a path lies in a folder, going by the names alone."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def locate(path: str, root: str) -> str:
    """The location of what a manifest calls `path`, going by the names alone where they lie in the root.

    Args:
        root: a resolved folder, or a URL.

    Raises MediaError for what lies outside, also once links are followed.
    """
    outside = f"outside the data root {without_secrets(root)}, where no file is opened"
    if is_url(root):
        relative = path.removeprefix(root.rstrip("/") + "/")
        if is_url(relative) or relative.startswith("/") or ".." in relative.split("/"):
            raise MediaError(outside)
        return f"{root.rstrip('/')}/{relative}"
    if is_url(path):
        raise MediaError(f"{outside}: a URL needs one as data.root")
    location = os.path.normpath(os.path.join(root, path))
    if inside(location, root):
        return location
    return Media(location, root=root).local_path()  # a link on the way may lead to the root all the same


def open_remote(url: str, block_bytes: int = BLOCK_BYTES) -> BinaryIO:
    """A remote file that seeks and reads by range. Raises what its protocol raises."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.open(path, "rb", block_size=block_bytes)


def remote_info(url: str) -> dict:
    """Size, and what else its protocol tells. Raises what its protocol raises."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.info(path)


def without_secrets(url: str) -> str:
    """A URL without the name and password, and the signature, that it may carry; a path as it is."""
    return re.sub(r"(://)[^/@]*@", r"\1", url.partition("?")[0]) if is_url(url) else url


@contextlib.contextmanager
def _remote_errors() -> Iterator[None]:
    """Protocols have exceptions of their own, such as aiohttp's and botocore's, which are no OSError."""
    try:
        yield
    except FileNotFoundError as error:
        raise MediaError("file missing") from error
    except OSError:
        raise
    except ImportError as error:
        raise MediaError(f"needs a package for its protocol: {error}") from error
    except Exception as error:
        raise MediaError(f"{type(error).__name__}: {error}") from error
