"""`dedupe`: of clips that look alike, the best.

A clip's signature is the perceptual hash (of the package imagehash) of a few of its frames, end to end. Letters:
N clips, F frames, D bits of distance.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.reading import row_name
from stdit.data.preparation.flow import Result, Section, Task, each_clip, finish
from stdit.errors import UserError

FRAMES = 4
HASH_BITS = 64
SIDE = 128
"""Pixels of the longer side that frames are decoded at; the hash looks at 32 x 32."""
PAIRS_AT_ONCE = 1 << 17


def dedupe_clips(task: Task, distance: float = 4.0) -> list[str]:
    """Leave out what looks like a better clip. Returns a summary; raises UserError.

    Args:
        distance: mean number of bits, of the 64 of a frame's hash, by which duplicates may differ.

    Better is: more frames x pixels, then first in the manifest. Only clips that look alike at the same parts of
    their length are found: not one that lies inside another, nor one that is mirrored or cropped.
    """
    if not 0 <= distance <= 16:
        raise UserError(
            f"--distance {distance:g}: must be from 0 (equal hashes) to 16 bits of {HASH_BITS} a frame"
        )
    need_imagehash()
    table = task.open()
    outcomes = each_clip(task, table, signature, (FRAMES, SIDE), "dedupe")
    whole = [place for place, outcome in enumerate(outcomes) if outcome.reason is None]
    hashes = np.array([list(bytes.fromhex(outcomes[place].value["hash"])) for place in whole], np.uint8)
    volumes = [outcomes[place].value["volume"] for place in whole]
    stand_ins = duplicates(hashes, volumes, int(distance * FRAMES))
    reasons = {place: outcomes[place].reason for place in range(len(outcomes))}
    for place, (better, bits) in stand_ins.items():
        better_path = row_name(table.rows[whole[better]])
        reasons[whole[place]] = f"duplicate: of {better_path}, {bits / FRAMES:g} bits apart"
    results = [
        Result(row, [] if reasons[place] else [row], reasons[place]) for place, row in enumerate(table.rows)
    ]
    return finish(task, table, results)


def need_imagehash() -> None:
    """Raises UserError."""
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise UserError(f"dedupe needs imagehash ({error}): pip install 'stdit[prepare]'") from None


def signature(section: Section) -> dict[str, str | int]:
    """The hash of a clip in hexadecimal, and its frames x pixels. Raises DecodeError and LeftOut."""
    import imagehash
    from PIL import Image

    part = section.part()
    height, width = part.size(SIDE)
    bits = []
    for k in range(FRAMES):
        start = 0.0 if part.is_still else part.start + part.seconds * (k + 0.5) / FRAMES
        frame = decode_clip(section.media, 1, part.fps, height, width, start=start)[0]
        bits.append(imagehash.phash(Image.fromarray(frame.permute(1, 2, 0).numpy())).hash.ravel())
    return {
        "hash": np.packbits(np.concatenate(bits)).tobytes().hex(),
        "volume": part.num_frames * part.height * part.width,
    }


def duplicates(hashes: np.ndarray, volumes: Sequence[int], bits: int) -> dict[int, tuple[int, int]]:
    """For each clip to leave out the better one that it looks like and that is kept, and their distance in bits.

    Every clip that is kept differs from every other kept one by more than `bits`; there are no chains, in which a
    clip gives way to one that is unlike it.

    Args:
        hashes: uint8 [N, bytes].
        volumes: the larger, the better; of equals the first.
    """
    best_first = sorted(range(len(hashes)), key=lambda place: (-volumes[place], place))
    leaders: dict[bytes, int] = {}  # the best clip of each hash: equal ones need not be compared again
    for place in best_first:
        leaders.setdefault(hashes[place].tobytes(), place)
    places = list(leaders.values())  # best first
    rivals: dict[int, list[tuple[int, int]]] = {}
    for better, worse, distance in alike(hashes[places], bits):
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


def alike(hashes: np.ndarray, bits: int) -> Iterator[tuple[int, int, int]]:
    """Pairs (lower place, higher place, distance) of clips that differ by at most `bits`, each once.

    Cut into bits + 1 bands, two such hashes have at least one band in common (pigeonholes), so that only clips with
    a band in common are compared: no pair is missed, and far fewer than N^2 are looked at.
    """
    if len(hashes) < 2:
        return
    spread = np.unpackbits(hashes, axis=1)  # [N, bits of a signature]
    bands = [np.packbits(band, axis=1) for band in np.array_split(spread, bits + 1, axis=1)]
    names = np.stack(
        [np.unique(band, axis=0, return_inverse=True)[1].ravel() for band in bands]
    )  # [D + 1, N]
    for b in range(len(bands)):
        order = np.argsort(names[b], kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(names[b][order])) + 1)
        for first, second in (pairs for group in groups if len(group) > 1 for pairs in _pairs(group)):
            new = (names[:b, first] != names[:b, second]).all(axis=0)  # no earlier band gave this pair
            first, second = first[new], second[new]
            distance = np.unpackbits(hashes[first] ^ hashes[second], axis=1).sum(axis=1)
            near = np.flatnonzero(distance <= bits)
            yield from zip(first[near].tolist(), second[near].tolist(), distance[near].tolist(), strict=True)


def _pairs(group: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of a group, whose places ascend, in pieces of bounded size."""
    step = max(1, PAIRS_AT_ONCE // len(group))
    for begin in range(0, len(group) - 1, step):
        rows = np.arange(begin, min(begin + step, len(group) - 1))
        first, second = np.nonzero(rows[:, None] < np.arange(len(group))[None])
        yield group[rows[first]], group[second]
