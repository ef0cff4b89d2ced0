"""`dedupe`: keep the best of clips that look alike.

A clip's signature is the concatenated perceptual hashes (package imagehash) of a few of its frames. Letters: N clips,
D bits of distance.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.reading import row_name
from stdit.data.preparation.flow import ClipRecord, RowResult, Task, is_link, process_clips, write_results
from stdit.data.preparation.table import Table, TableRow
from stdit.errors import UserError, install_command

HASHED_FRAMES = 4
HASH_BITS = 64
"""Per frame."""
HASH_SIDE = 128
"""Pixels of the longer side of decoded frames; the hash uses 32 x 32."""
PAIRS_AT_ONCE = 1 << 17


def dedupe_clips(task: Task, distance: float = 4.0) -> list[str]:
    """Exclude clips that look like a better one. Returns a summary; raises UserError.

    The better clip is the one that has a caption, then the one with more frames x pixels, with more columns filled
    in, that is a file and not a link, and at last the first in the manifest. Clips are compared at the same fractions
    of their length, so that a part of another clip, a mirrored or a cropped clip is not found.

    Args:
        distance: mean number of bits, of the 64 of a frame's hash, by which duplicates may differ.
    """
    if not 0 <= distance <= 16:
        raise UserError(
            f"--distance {distance:g}: must be from 0 (equal hashes) to 16, of {HASH_BITS} bits per frame"
        )
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise UserError(f"dedupe needs imagehash ({error}): {install_command('prepare')}") from None
    table = task.open()
    outcomes = process_clips(task, table, _signature, (HASHED_FRAMES, HASH_SIDE), "dedupe")
    readable = [place for place, outcome in enumerate(outcomes) if outcome.reason is None]
    hashes = np.array([list(bytes.fromhex(outcomes[place].value["hash"])) for place in readable], np.uint8)
    worths = [_worth(table, table.rows[place], outcomes[place].value["volume"]) for place in readable]
    reasons = [outcome.reason for outcome in outcomes]
    for place, (better, bits) in find_duplicates(hashes, worths, int(distance * HASHED_FRAMES)).items():
        better_path = row_name(table.rows[readable[better]])
        reasons[readable[place]] = f"duplicate: of {better_path}, {bits / HASHED_FRAMES:g} bits apart"
    results = [
        RowResult(row, [] if reason else [row], reason)
        for row, reason in zip(table.rows, reasons, strict=True)
    ]
    return write_results(task, table, results)


def _worth(table: Table, row: TableRow, volume: int) -> tuple[bool, int, int, bool]:
    """Return what decides between copies, the larger the better.

    A caption comes first, since training skips clips without one.
    """
    filled = sum(row.get(column) not in (None, "") for column in table.columns)
    return bool(row["text"]), volume, filled, not is_link(row, table.root)


def _signature(record: ClipRecord) -> dict[str, str | int]:
    """Return the hash of a clip in hexadecimal, and its frames x pixels. Raises DecodeError and ExcludedError."""
    import imagehash
    from PIL import Image

    span = record.span()
    height, width = span.size(HASH_SIDE)
    bits = []
    for k in range(HASHED_FRAMES):
        start = 0.0 if span.is_still else span.start + span.seconds * (k + 0.5) / HASHED_FRAMES
        frame = decode_clip(
            record.media, 1, span.fps, height, width, start=start, field_order=record.field_order
        )[0]
        bits.append(imagehash.phash(Image.fromarray(frame.permute(1, 2, 0).numpy())).hash.ravel())
    return {
        "hash": np.packbits(np.concatenate(bits)).tobytes().hex(),
        "volume": span.num_frames * span.height * span.width,
    }


def find_duplicates(hashes: np.ndarray, worths: Sequence[Any], bits: int) -> dict[int, tuple[int, int]]:
    """Return for each clip to exclude the better one that is kept, and their distance in bits.

    Kept clips differ from each other by more than `bits`, and an excluded clip from the kept one by at most `bits`
    (there are no chains of duplicates).

    Args:
        hashes: uint8 [N, bytes].
        worths: of each clip; the larger the better, of equals the first.
    """
    best_first = sorted(range(len(hashes)), key=worths.__getitem__, reverse=True)
    leaders: dict[bytes, int] = {}  # the best clip of each hash, so that equal ones are not compared
    for place in best_first:
        leaders.setdefault(hashes[place].tobytes(), place)
    places = list(leaders.values())  # best first
    rivals: dict[int, list[tuple[int, int]]] = {}
    for better, worse, distance in similar_pairs(hashes[places], bits):
        rivals.setdefault(worse, []).append((distance, better))
    gone: dict[int, tuple[int, int]] = {}  # places in `places`
    for leader in range(len(places)):
        kept = [(distance, better) for distance, better in rivals.get(leader, ()) if better not in gone]
        if kept:
            distance, better = min(kept)
            gone[leader] = (better, distance)
    result = {}
    rank = {place: leader for leader, place in enumerate(places)}
    for place in best_first:
        leader = rank[leaders[hashes[place].tobytes()]]
        stays, distance = gone.get(leader, (leader, 0))
        if places[stays] != place:
            result[place] = (places[stays], distance)
    return result


def similar_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield all pairs (lower place, higher place, distance) of clips that differ by at most `bits`, each once.

    Hashes are cut into bits + 1 bands. Two that differ by at most `bits` have at least one band in common (pigeonhole
    principle), so only clips with a common band are compared: no pair is missed, and far fewer than N^2 are compared.
    """
    if len(hashes) < 2:
        return
    unpacked = np.unpackbits(hashes, axis=1)  # [N, bits of a signature]
    bands = [np.packbits(band, axis=1) for band in np.array_split(unpacked, bits + 1, axis=1)]
    names = np.stack(
        [np.unique(band, axis=0, return_inverse=True)[1].ravel() for band in bands]
    )  # [D + 1, N]
    for b in range(len(bands)):
        order = np.argsort(names[b], kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(names[b][order])) + 1)
        for first, second in (pairs for group in groups if len(group) > 1 for pairs in _pairs(group)):
            new = (names[:b, first] != names[:b, second]).all(
                axis=0
            )  # this pair has no earlier band in common
            first, second = first[new], second[new]
            distance = np.unpackbits(hashes[first] ^ hashes[second], axis=1).sum(axis=1)
            near = np.flatnonzero(distance <= bits)
            yield from zip(first[near].tolist(), second[near].tolist(), distance[near].tolist(), strict=True)


def _pairs(group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of a group, whose places ascend, in chunks of bounded size."""
    step = max(1, PAIRS_AT_ONCE // len(group))
    for begin in range(0, len(group) - 1, step):
        rows = np.arange(begin, min(begin + step, len(group) - 1))
        first, second = np.nonzero(rows[:, None] < np.arange(len(group))[None])
        yield group[rows[first]], group[second]
