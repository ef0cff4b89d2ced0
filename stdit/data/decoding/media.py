"""Locate and open the bytes of a clip: a local file, or a range of a local or remote file."""

import contextlib
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PROTOCOL = re.compile(r"[A-Za-z][\w+.-]+(://|::)")
EMPTY = "is empty (0 bytes)"
BLOCK_BYTES = 1 << 22
"""Largest read-ahead of a request to a remote file."""


class MediaError(OSError):
    """Bytes that cannot be read, or are outside the data root; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Media:
    """The location of a video's or image's bytes: a whole file, or `size` bytes from `offset` on.

    A value without an open file: cheap to make (no access to the file), hashable, and picklable for worker processes.
    """

    location: str
    """Path of a local file, or a URL that fsspec opens."""
    member: str = ""
    """Name inside the archive at `location`."""
    offset: int = 0
    size: int | None = None
    """Bytes; None: to the end of the file."""
    root: str | None = None
    """Data root, a resolved local folder in which the file must lie after links are followed, or a URL;
    None: the file may lie anywhere."""

    @classmethod
    def of(cls, file: "Media | Path | str") -> "Media":
        """Make the media of a file that the user named, wherever it lies."""
        return file if isinstance(file, Media) else cls(os.fspath(file))

    def __str__(self) -> str:
        location = without_secrets(self.location)
        return f"{location}/{self.member}" if self.member else location

    @property
    def name(self) -> str:
        """Name relative to the data root, which does not change when the root moves; for fingerprints."""
        full, root = str(self), self.root
        if root is None:
            return full
        root = without_secrets(root).rstrip("/") + "/"
        return full.removeprefix(root)

    @property
    def suffix(self) -> str:
        """File name suffix in lower case, with its dot."""
        return posixpath.splitext(self.member or str(self))[1].lower()

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    def state(self) -> tuple[int | str, ...]:
        """Return values that change when the bytes change: size, modification time (or ETag), and the range.

        Raises OSError.
        """
        if self.is_remote:
            with _remote_errors():
                filesystem, path = _remote_file(self.location)
                info = filesystem.info(path)
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
        """Return the resolved path of a local file. Raises MediaError unless it is a file inside the root."""
        assert not self.is_remote
        try:
            path = os.path.realpath(self.location)
            if self.root is not None and not inside(path, self.root):
                raise MediaError(f"outside the data root {self.root}, where no file is opened")
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            raise MediaError("file missing") from None
        except MediaError:
            raise
        except (OSError, ValueError) as error:  # a null byte, a name too long, a loop of links
            raise MediaError(f"path cannot be used: {error}") from error
        if stat.S_ISDIR(mode):
            raise MediaError("file missing")
        if not stat.S_ISREG(mode):
            raise MediaError("not a regular file, but a pipe, socket or device")
        return path

    @contextlib.contextmanager
    def opened(self) -> Iterator[str | BinaryIO]:
        """Yield what PyAV and Pillow can open: the path of a whole local file, else a file object over the range.

        Raises OSError, also for exceptions of the libraries of remote protocols.
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
        """Open a read-only file object over the bytes. It and its methods raise OSError.

        Args:
            block_bytes: read-ahead of a remote file.
        """
        if self.size == 0:
            raise MediaError(EMPTY)
        if not self.is_remote:
            path = self.local_path()
            if self.size is not None and self.offset + self.size > os.path.getsize(path):
                raise MediaError(f"its archive {self.location} is cut short")
            whole: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (_Range closes it)
        else:
            with _remote_errors():
                filesystem, path = _remote_file(self.location)
                block_bytes = min(self.size or block_bytes, block_bytes)
                whole = filesystem.open(path, "rb", block_size=block_bytes)
        return io.BufferedReader(_Range(whole, self.offset, self.size, self.member or self.location), 1 << 16)


class _Range(io.RawIOBase):
    """A read-only file over a part of an open file, which it owns."""

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
    """Whether a location is a URL of fsspec: `s3://bucket/a.tar`, `simplecache::https://...`."""
    return PROTOCOL.match(location) is not None


def inside(path: str, root: str) -> bool:
    """Whether a path lies in a folder, judging by the names alone."""
    return path.startswith(root.rstrip(os.sep) + os.sep)


def locate(path: str, root: str) -> str:
    """Return the location of a path of a manifest, without accessing it if its name lies in the root.

    Args:
        root: a resolved folder, or a URL.

    Raises MediaError if it lies outside the root, also after links are followed.
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
    return Media(location, root=root).local_path()  # it may lie in the root after links are followed


def _remote_file(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Raises the exceptions of its protocol."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def without_secrets(url: str) -> str:
    """Return a URL without user name, password and query string; a path unchanged."""
    return re.sub(r"(://)[^/@]*@", r"\1", url.partition("?")[0]) if is_url(url) else url


@contextlib.contextmanager
def _remote_errors() -> Iterator[None]:
    """Turn exceptions of protocols (of aiohttp, botocore, ...), which need not be OSErrors, into MediaError."""
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
