"""Files that clients send: kept under the hash of their content, once they are known to be pictures or videos."""

import hashlib
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.serve.errors import RequestError

_ID = re.compile(r"file_[0-9a-f]{64}")


@dataclass
class Uploads:
    """A folder of files that clients sent.

    Args:
        max_bytes: of a file.
        max_total_bytes: of all files together; None: no limit.
    """

    folder: Path
    max_bytes: int
    max_total_bytes: int | None = None

    def save(self, chunks: Iterable[bytes], name: str = "", field: str = "file") -> dict[str, Any]:
        """Keep a file and return what is known of it.

        Args:
            name: of the file, for people.
            field: of the form, for errors.

        Raises:
            RequestError: if it is too large, empty, or no picture or video, or there is no room for it.
        """
        try:
            return self._save(chunks, name, field)
        except OSError as error:
            raise no_room(error.strerror or "error", field) from None

    def _save(self, chunks: Iterable[bytes], name: str, field: str) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        others = 0 if self.max_total_bytes is None else self._total_bytes()
        aside = self.folder / f".{os.getpid()}-{time.monotonic_ns()}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with open(aside, "xb") as file:
                for chunk in chunks:
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise too_large(self.max_bytes, field)
                    if self.max_total_bytes is not None and others + size > self.max_total_bytes:
                        raise no_room(
                            f"at most {self.max_total_bytes / 2**30:g} GiB, --server.max_uploads_gib", field
                        )
                    digest.update(chunk)
                    file.write(chunk)
            found = _probe(aside, name, field)
            target = self.folder / f"file_{digest.hexdigest()}"
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return {"id": target.name, "object": "upload", "name": shown_name(name), "bytes": size, **found}

    def _total_bytes(self) -> int:
        total = 0
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # it has just been removed
                total += file.stat().st_size
        return total

    def find(self, upload: str) -> Path:
        """Return the file of an upload. Raises RequestError if there is none of that id."""
        file = self.folder / upload if _ID.fullmatch(upload) else None
        try:
            if file is None or not file.is_file():
                raise FileNotFoundError
            os.utime(file)  # in use: it is not too old
        except FileNotFoundError:
            raise RequestError(
                f"there is no upload {upload!r:.80}, or no longer: send the file to /v1/uploads again.",
                status=404,
                param="id",
                code="not_found",
            ) from None
        return file

    def remove_older(self, seconds: float) -> list[Path]:
        """Delete the files whose last use is longer ago than this; return them."""
        removed = []
        for file in self.folder.glob("*") if self.folder.is_dir() else ():
            with suppress(FileNotFoundError):  # another process has removed it
                if time.time() - file.stat().st_mtime > seconds:
                    file.unlink()
                    removed.append(file)
        return removed


def too_large(max_bytes: int, field: str | None = None) -> RequestError:
    """Return the error of a request that sends too much, in a field of its form if it is known."""
    return RequestError(
        f"the files of the request are larger than {round(max_bytes / 2**20, 3):g} MiB (--server.max_upload_mib): "
        "send a smaller file.",
        status=413,
        param=field,
        code="too_large",
    )


def no_room(reason: str, field: str | None = None) -> RequestError:
    """Return the error of a file for which there is no room, or that cannot be written."""
    return RequestError(
        f"the file cannot be kept here ({reason}): try again later, or ask who runs the server to make room.",
        status=507,
        param=field,
        code="no_room",
    )


def shown_name(name: str) -> str:
    """Return the last part of a file's name, for people only."""
    return "".join(letter for letter in re.split(r"[\\/]", name)[-1] if letter.isprintable())[:120]


def _probe(file: Path, name: str, field: str) -> dict[str, Any]:
    from stdit.data.decoding.decode import DecodeError, decode_clip, probe

    try:
        found = probe(file)
        decode_clip(file, 1, found.fps or 1.0, 16, 16)  # its header may promise more than there is
    except DecodeError as error:
        reason = error.reason.replace(str(file), shown_name(name))
        raise RequestError(
            f"{shown_name(name) or field}: {reason}: use an intact picture or video.",
            param=field,
            code="not_a_video",
        ) from None
    return {
        "kind": "video" if found.num_frames > 1 else "image",
        "num_frames": found.num_frames,
        "fps": found.fps,
        "width": found.width,
        "height": found.height,
    }
