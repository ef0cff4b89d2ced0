"""Tar shards in the WebDataset format: a video or image and its .txt or .json share a key.

A shard is scanned once, from header to header, to find the position of each video (`Media`), from which it is read
later. Nothing is extracted.
"""

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from stdit.data.decoding.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from stdit.data.decoding.media import EMPTY, Media, is_url, locate
from stdit.data.manifest.rows import OTHER_NAMES, Rows, as_text
from stdit.errors import UserError

MAX_TEXT_BYTES = 1 << 20
SHARDS_PER_CHUNK = 64
MAX_SHARDS = 1_000_000
HEADER_BLOCK_BYTES = 1 << 16
"""Read-ahead while a remote shard is scanned: a header, and the captions beside it."""
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tzst|txz)$", re.IGNORECASE)


class Member(NamedTuple):
    """A file in an archive: the position of its bytes, or the reason why it is not read."""

    name: str
    offset: int
    size: int
    refused: str = ""


def is_archive(manifest: str) -> bool:
    """Whether a manifest names tar shards. Raises UserError for compressed ones."""
    name = manifest.partition("?")[0] if is_url(manifest) else manifest
    if COMPRESSED.search(name):
        raise UserError(
            f"manifest {manifest}: a compressed archive cannot be read at any position: unpack it to .tar "
            "(compression does not make videos smaller)"
        )
    return name.lower().endswith(".tar")


def find_shards(pattern: str) -> list[str]:
    """Return paths or URLs of shards, in order: expand `{000..099}` and `{a,b}`, then match `*` and `[ab]`.

    Raises UserError if there is none, or one that is named is missing.
    """
    if os.path.exists(pattern):
        return [pattern]
    found: list[str] = []
    for name in itertools.islice(_expand_braces(pattern), MAX_SHARDS + 1):
        if re.search(r"[*\[]", name):
            matches = sorted(_remote_matches(name) if is_url(name) else glob.glob(name, recursive=True))
            if not matches:
                raise UserError(
                    f"manifest {name} matches no file: correct the path (a setting of data or validation in training)"
                )
            found += matches
        elif not is_url(name) and not os.path.isfile(name):
            raise UserError(
                f"manifest {name} does not exist: correct the path (a setting of data or validation in training)"
            )
        else:
            found.append(name)
    if len(found) > MAX_SHARDS:
        raise UserError(f"manifest {pattern} stands for more than {MAX_SHARDS} shards: check its braces")
    return list(dict.fromkeys(found))


def shard_root(pattern: str) -> str:
    """Return the resolved folder, or the URL, that contains all shards of a pattern."""
    plain = re.split(r"[{*\[]", pattern, maxsplit=1)[0]
    parent = plain.rpartition("/")[0]
    return parent if is_url(pattern) else os.path.realpath(parent or ("/" if plain.startswith("/") else "."))


def archive_rows(shards: list[str], root: str) -> Iterator[Rows]:
    """Yield rows of shards in order, with the columns member, offset and size; several are scanned in parallel.

    A shard that cannot be read, or only in part, gives an additional refused row.

    Args:
        root: the data root, a resolved folder or a URL, to which `path` is relative.
    """
    with ThreadPoolExecutor() as pool:
        with tqdm(total=len(shards), desc="reading shards", unit="shard", delay=3, disable=None) as bar:
            for first in range(0, len(shards), SHARDS_PER_CHUNK):
                for rows in pool.map(
                    lambda shard: _shard_rows(shard, root), shards[first : first + SHARDS_PER_CHUNK]
                ):
                    bar.update()
                    yield rows


def _iter_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar archive. Raises tarfile.TarError if it is damaged or ends too early."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
            if info.isdir():
                continue
            if info.offset_data + info.size > end:
                raise tarfile.ReadError(f"{info.name} is cut short")
            yield Member(info.name, info.offset_data, info.size, _refusal(info))
        file.seek(archive.offset)
        mark = file.read(tarfile.BLOCKSIZE)
        if mark != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(
                "damaged header" if len(mark) == tarfile.BLOCKSIZE else "its end is missing"
            )


def _refusal(info: tarfile.TarInfo) -> str:
    """Return the reason why a member is not read; empty if it may be."""
    if info.issym() or info.islnk():
        return f"link in an archive, which is not followed: to {info.linkname}"
    if not info.isreg() or info.issparse():
        return "no plain file in an archive"
    if info.name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", info.name):
        return "absolute path in an archive"
    if ".." in re.split(r"[/\\]", info.name):
        return "path that leaves its archive"
    return ""


def _shard_rows(shard: str, root: str) -> Rows:
    members: list[Member] = []
    texts: dict[str, bytes] = {}
    path = shard if is_url(shard) else os.path.abspath(shard)
    rows = _RowList(path)
    try:
        media = Media(locate(path, root), root=root)
        rows.path = media.location.removeprefix(root.rstrip("/") + "/")
        with media.open(HEADER_BLOCK_BYTES) as file:
            for member in _iter_members(file):
                members.append(member)
                if (
                    member.name.endswith((".txt", ".json"))
                    and not member.refused
                    and member.size <= MAX_TEXT_BYTES
                ):
                    file.seek(member.offset)
                    texts[member.name] = file.read(member.size)
    except tarfile.TarError as error:
        kind = "shard cut short or damaged" if members else "shard cannot be read"
        rows.refuse("", f"{kind}: {error}, after {len(members)} whole members")
    except OSError as error:
        rows.refuse("", f"shard cannot be read: {error.strerror or error}")
    for member, refusal in _chosen(members):
        if refusal:
            rows.refuse(member.name, refusal)
        else:
            fields, refusal = _caption(member, texts)
            if member.size == 0:
                refusal = f"cannot be read: {EMPTY}"
            rows.add(member, fields, refusal)
    return rows.by_column()


def _chosen(members: Iterable[Member]) -> Iterator[tuple[Member, str]]:
    """Yield the clip of each key, and the excluded members with the reason."""
    seen: set[str] = set()
    clips: dict[str, Member] = {}
    rest: list[tuple[Member, str]] = []
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if member.refused:
            yield member, member.refused
        elif suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            if suffix in (".txt", ".json") and member.size > MAX_TEXT_BYTES:
                yield (
                    member,
                    f"caption file too large: {member.size} bytes, at most {MAX_TEXT_BYTES} are read",
                )
        elif member.name in seen:
            yield member, "name occurs twice in its archive"
        else:
            seen.add(member.name)
            key = _key(member.name)
            before = clips.get(key)
            if (
                before
                and suffix in VIDEO_SUFFIXES
                and PurePosixPath(before.name).suffix.lower() in IMAGE_SUFFIXES
            ):
                clips[key], member = member, before
            elif before is None:
                clips[key] = member
                continue
            rest.append((member, f"beside another of its key: {clips[key].name}"))
    yield from ((member, "") for member in clips.values())
    yield from rest


def _caption(member: Member, texts: dict[str, bytes]) -> tuple[dict[str, str], str]:
    """Return the fields of the .json and .txt of a member's key, the caption as "text"; or the reason why not."""
    key = _key(member.name)
    fields: dict[str, Any] = {}
    try:
        if content := texts.get(f"{key}.json"):
            fields = json.loads(content.decode("utf-8-sig"))
            if not isinstance(fields, dict):
                return {}, "caption file malformed: its .json is no object"
        if (content := texts.get(f"{key}.txt")) is not None:
            fields["text"] = content.decode("utf-8-sig")
    except (ValueError, RecursionError) as error:
        return {}, f"caption file malformed: {error}"
    if not fields.get("text"):
        fields["text"] = next((fields[name] for name in OTHER_NAMES["text"] if fields.get(name)), "")
    reserved = ("path", "member", "offset", "size")
    return {name: as_text(value) for name, value in fields.items() if name not in reserved}, ""


def _key(name: str) -> str:
    return name[: -len(PurePosixPath(name).suffix)]


class _RowList:
    """Rows of one shard, collected one by one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.refused: dict[int, str] = {}

    def add(self, member: Member, fields: dict[str, str], refusal: str = "") -> None:
        place = {"member": member.name, "offset": str(member.offset), "size": str(member.size)}
        if refusal:
            self.refused[len(self.rows)] = refusal
        self.rows.append({**fields, **place, "path": self.path})

    def refuse(self, name: str, reason: str) -> None:
        self.add(Member(name, 0, 0), {}, reason)

    def by_column(self) -> Rows:
        names = dict.fromkeys(("path", "text", "member", "offset", "size"))
        names.update(dict.fromkeys(name for row in self.rows for name in row))
        return Rows({name: [row.get(name, "") for row in self.rows] for name in names}, self.refused)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield the pattern for each choice of its braces; the first brace varies slowest."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    for choice in _choices(found[1], pattern):
        yield from _expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _choices(inner: str, pattern: str) -> Iterator[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        if int(last) < int(first):
            raise UserError(f"manifest {pattern}: {{{inner}}} counts down: write {{{last}..{first}}}")
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    elif "," in inner:
        yield from inner.split(",")
    else:
        raise UserError(
            f"manifest {pattern}: {{{inner}}} is neither numbers {{000..099}} nor choices {{a,b}}"
        )


def _remote_matches(pattern: str) -> list[str]:
    """Return the matching URLs. Raises UserError."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(name) for name in filesystem.glob(path)]
    except Exception as error:  # protocols have exceptions of their own
        raise UserError(
            f"manifest {pattern} cannot be looked up ({type(error).__name__}: {error})"
        ) from error
