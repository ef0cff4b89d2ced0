"""Tiles of a video: which there are, how much memory they take, and how they become one video again.

Tiles overlap, and their pixels are blended by weights that rise and fall linearly over the overlap, as in diffusers'
VAEs; these tile each in its own way and mostly not in time, so that here one way serves all codecs. A codec that
decodes groups of frames one after the other (`Cuts.streams`) continues in the next tile where the one before ended.

Letters: B batch, C channels, T frames, H height, W width in pixels; T' H' W' the same of the latents.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from sys import maxsize
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stdit.codecs.config import OVERLAP_FRAMES, OVERLAP_PIXELS, Tile
from stdit.errors import UserError
from stdit.parallel.sequence.collectives import all_gather
from stdit.parallel.sequence.group import ONE_RANK, Group
from stdit.parallel.sequence.planner import format_gib

WHOLE = maxsize
"""As the frames, rows or columns of a tile: all."""
AUTO_SIZES = (WHOLE, 1024, 768, 512, 384, 256, 192, 128)
"""Rows and columns of a tile, in pixels, of which ``auto`` takes one."""
MOST_BYTES_PER_PIXEL = 2**14
"""More than any decoder needs: a video that fits with as many is decoded whole, and nothing is estimated."""


@dataclass(frozen=True)
class Cuts:
    """Where latents may be cut along time: between groups of frames."""

    latents: int
    """Latent frames of a group."""
    frames: int
    """Frames of a group."""
    first: int = 0
    """1: a latent frame before the groups stands for one frame."""
    exact: bool = False
    """A group decodes to the same pixels whatever the other groups are."""
    streams: bool = False
    """Groups are decoded one after the other, each with what is kept of those before: cuts change nothing."""

    @property
    def overlap(self) -> int:
        """Groups that neighbouring tiles share."""
        return 0 if self.exact or self.streams else ceil(OVERLAP_FRAMES / self.frames)

    @property
    def fewest(self) -> int:
        """Groups of the smallest tile; of a stream as many as it takes until all is kept that ever is."""
        return 4 if self.streams else max(2 * self.overlap, 1)


class Tileable(Protocol):
    """What plans need of a codec."""

    stride: tuple[int, int, int]
    """Frames, rows and columns of pixels per latent."""

    @property
    def cuts(self) -> Cuts: ...

    def decoding_bytes(self, latent_shape: tuple[int, int, int], batch_size: int = 1) -> int: ...

    def feature_bytes(self, latent_shape: Sequence[int]) -> int: ...


class Interval(NamedTuple):
    """From ``start`` to ``stop``, which is not included."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Box = tuple[Interval, Interval, Interval]
"""Frames, rows and columns."""


def cut(x: Tensor, box: Box) -> Tensor:
    """Return a box of ``[B C T H W]``, as a view."""
    (t, t_end), (h, h_end), (w, w_end) = box
    return x[:, :, t:t_end, h:h_end, w:w_end]


class Part(NamedTuple):
    """Part of an axis."""

    latents: Interval
    """What is decoded."""
    pixels: Interval
    """What that becomes, without the frames of `context`."""
    context: int = 0
    """Latent frames in front that each become one frame, which is dropped: a causal decoder begins with one."""


class Ranks(NamedTuple):
    """The ranks that decode a video together, as a grid of two groups."""

    sp: Group = ONE_RANK
    cfg: Group = ONE_RANK

    @property
    def size(self) -> int:
        return self.sp.size * self.cfg.size

    @property
    def rank(self) -> int:
        return self.cfg.rank * self.sp.size + self.sp.rank

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Return the vectors of all ranks, of which rank r has ``sizes[r]`` values, on every rank."""
        per_row = [list(sizes[row : row + self.sp.size]) for row in range(0, self.size, self.sp.size)]
        row = all_gather(x, self.sp, 0, per_row[self.cfg.rank])
        return all_gather(row, self.cfg, 0, [sum(one) for one in per_row]).split(list(sizes))

    def smallest(self, value: int, device: torch.device) -> int:
        """Return the smallest of the values of all ranks, which they exchange on this device."""
        return min(int(one) for one in self.gather(torch.tensor([value], device=device), [1] * self.size))


ALONE = Ranks()


@dataclass(frozen=True)
class TilePlan:
    """The parts of each axis: every tile is one part of time, of rows and of columns."""

    time: tuple[Part, ...]
    rows: tuple[Part, ...]
    columns: tuple[Part, ...]
    cuts: Cuts

    @classmethod
    def of(
        cls,
        codec: Tileable,
        latent_shape: Sequence[int],
        size: Sequence[int],
        tile: tuple[int, int, int],
    ) -> "TilePlan":
        """Plan tiles of at most as many frames (with a causal codec, and one more), rows and columns of pixels.

        Args:
            latent_shape: T', H', W'.
            size: T, H and W of the video, to which what is decoded is cut.
        """
        cuts, (frames, height, width), (_, *strides) = codec.cuts, latent_shape, codec.stride
        groups = ceil((frames - cuts.first) / cuts.latents)
        per_tile = max(tile[0] // cuts.frames, cuts.fewest)
        context = 0 if cuts.streams else cuts.first
        time = []
        for start, stop in intervals(groups, per_tile, cuts.overlap):
            latents = Interval(
                cuts.first * (start > 0) + start * cuts.latents - context * (start > 0),
                min(cuts.first + stop * cuts.latents, frames),
            )
            pixels = Interval(
                cuts.first * (start > 0) + start * cuts.frames, min(cuts.first + stop * cuts.frames, size[0])
            )
            if len(pixels) > 0 or start == 0:  # a rank may have no frames
                time.append(Part(latents, pixels, context * (start > 0)))
        rows, columns = (
            tuple(
                Part(Interval(start, stop), Interval(start * stride, min(stop * stride, pixels)))
                for start, stop in intervals(length, max(limit // stride, overlap + 1), overlap)
                if start * stride < pixels
            )
            for length, pixels, limit, stride, overlap in zip(
                (height, width), size[1:], tile[1:], strides, map(_overlap, strides), strict=True
            )
        )
        return cls(tuple(time), rows, columns, cuts)

    @property
    def whole(self) -> bool:
        """Whether there is one tile."""
        return self.counts == (1, 1, 1)

    @property
    def axes(self) -> tuple[tuple[Part, ...], ...]:
        return self.time, self.rows, self.columns

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) of the video."""
        frames, height, width = (parts[-1].pixels.stop for parts in self.axes)
        return frames, height, width

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along time, height and width."""
        return tuple(map(len, self.axes))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T', H', W') of the largest tile."""
        frames, rows, columns = (max(len(part.latents) for part in parts) for parts in self.axes)
        return frames, rows, columns

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the largest tile."""
        frames, rows, columns = (max(len(part.pixels) for part in parts) for parts in self.axes)
        return frames, rows, columns

    @property
    def work(self) -> int:
        """Latents that are decoded, those of overlaps again for each tile."""
        return prod(sum(len(part.latents) for part in parts) for parts in self.axes)

    def jobs(self) -> list[list[tuple[Part, Part, Part]]]:
        """Return the tiles, by those that one rank decodes one after the other."""
        if self.cuts.streams:
            return [[(t, h, w) for t in self.time] for h, w in product(self.rows, self.columns)]
        return [[tile] for tile in product(self.time, self.rows, self.columns)]

    def __str__(self) -> str:
        """Return a text such as "2 x 3 x 4 tiles of up to 33 x 256 x 256 (frames, rows, columns)"."""
        return f"{_by(self.counts)} tiles of up to {_by(self.pixel_shape)} (frames, rows, columns)"


def _overlap(stride: int) -> int:
    return ceil(OVERLAP_PIXELS / stride)


def intervals(length: int, size: int, overlap: int) -> list[Interval]:
    """Return spans of one size that cover 0 to ``length``, neighbours of which share at least ``overlap``.

    They are as few as ``size`` allows, and then as small as possible. Without an overlap they share nothing, and may
    differ in size by 1.
    """
    if length <= size:
        return [Interval(0, length)]
    count = ceil((length - overlap) / (size - overlap))
    if overlap == 0:
        return [Interval(i * length // count, (i + 1) * length // count) for i in range(count)]
    least = ceil((length + (count - 1) * overlap) / count)
    starts = [i * (length - least) // (count - 1) for i in range(count)]
    return [Interval(start, start + least) for start in starts]


def ramps(spans: Sequence[Interval]) -> list[Tensor]:
    """Return the weights float32 ``[length]`` of spans that overlap: at each place their sum is 1.

    Over the overlap of two they rise and fall linearly.
    """
    total = torch.zeros(spans[-1].stop, dtype=torch.float64)
    weights = []
    for i, span in enumerate(spans):
        place, weight = torch.arange(len(span)) + 0.5, torch.ones(len(span), dtype=torch.float64)
        if i > 0 and (shared := spans[i - 1].stop - span.start) > 0:
            weight = weight.minimum(place / shared)
        if i + 1 < len(spans) and (shared := span.stop - spans[i + 1].start) > 0:
            weight = weight.minimum((len(span) - place) / shared)
        total[span.start : span.stop] += weight
        weights.append(weight)
    return [
        (weight / total[span.start : span.stop]).float() for weight, span in zip(weights, spans, strict=True)
    ]


def blend(
    axes: Sequence[Sequence[Interval]],
    jobs: Sequence[Sequence[Box]],
    compute: Callable[[int], Iterator[Tensor]],
    into: Tensor,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Add tiles to ``into [B C T H W]``, which is zero, each with its weights.

    The ranks compute them in turn; each adds all of them in the same order, so that all get what one process gets.

    Args:
        axes: what the tiles cover of each axis.
        jobs: the tiles, by those that are computed one after the other; all jobs have as many.
        compute: yields the tiles of a job, of the dtype and device of ``into``.
    """
    weights = [dict(zip(spans, ramps(spans), strict=True)) for spans in axes]
    for begin in range(0, len(jobs), ranks.size):
        in_round = jobs[begin : begin + ranks.size]
        own = compute(begin + ranks.rank) if ranks.rank < len(in_round) else iter(())
        for step in range(len(in_round[0])):
            tiles = [job[step] for job in in_round]
            shapes = [[*into.shape[:2], *map(len, tile)] for tile in tiles]
            sizes = [*map(prod, shapes)] + [0] * (ranks.size - len(tiles))
            computed = ranks.gather(next(own, into.new_empty(0)).flatten(), sizes)
            for tile, shape, values in zip(tiles, shapes, computed, strict=False):
                t, h, w = (of_axis[span].to(into.device) for of_axis, span in zip(weights, tile, strict=True))
                cut(into, tile).addcmul_(values.view(shape), t[:, None, None] * (h[:, None] * w))
            del computed, values  # before the next ones are computed
    return into


def plan_tiles(
    codec: Tileable,
    latent_shape: Sequence[int],
    size: Sequence[int],
    tile: Tile | None,
    memory: int,
    batch_size: int = 1,
    reserved: int = 0,
) -> TilePlan:
    """Plan the tiles of a video: of those that fit in memory the ones with which the least is decoded twice.

    Args:
        latent_shape: T', H', W' of the latents.
        size: T, H and W of the video.
        tile: ``codec.tile``; None: whole.
        memory: bytes that decoding may take.
        batch_size: videos that are decoded at once.
        reserved: bytes of ``memory`` that other videos of a batch take.

    Raises:
        UserError: if no tile fits in memory, or not the one that is asked for; says which one does.
    """
    memory -= reserved
    video = codec, latent_shape, size, memory, batch_size
    found = best_plan(tile, *video)
    if _surely_whole(tile, size, memory, batch_size):
        return found
    needed = tiled_bytes(codec, found, batch_size)
    if needed <= memory:
        return found
    others = (side for side in AUTO_SIZES[1:] if tile != "auto" and _fitting(side, *video)[0] is not None)
    other = next(others, None)
    raise UserError(
        f"codec.tile = {list(tile) if isinstance(tile, tuple) else tile}: to decode {_by(size)} (frames, rows, "
        f"columns) in tiles of {_by(found.pixel_shape)} needs {format_gib(needed)} GiB of memory, and "
        f"{format_gib(max(memory, 0))} GiB is free"
        + (f" beside the other videos of a batch, {format_gib(reserved)} GiB" if reserved else "")
        + ": "
        + (
            "no smaller tile fits, either: free memory, or make a smaller or shorter video."
            if other is None
            else f"use {other}, which fits, or auto."
        )
        + (" Or use a smaller batch_size." if reserved else "")
    )


def best_plan(
    tile: Tile | None,
    codec: Tileable,
    latent_shape: Sequence[int],
    size: Sequence[int],
    memory: int,
    batch_size: int = 1,
) -> TilePlan:
    """Return the tiles of `plan_tiles`; if none fit in memory, those that take the least."""
    if _surely_whole(tile, size, memory, batch_size):
        return TilePlan.of(codec, latent_shape, size, (WHOLE,) * 3)
    assert tile is not None
    found, smallest = _fitting(tile, codec, latent_shape, size, memory, batch_size)
    return smallest if found is None else found


def _surely_whole(tile: Tile | None, size: Sequence[int], memory: int, batch_size: int) -> bool:
    """Return whether a video is decoded whole without an estimate of the memory that this takes."""
    return tile is None or (tile == "auto" and batch_size * prod(size) * MOST_BYTES_PER_PIXEL <= memory)


def _fitting(
    tile: Tile,
    codec: Tileable,
    latent_shape: Sequence[int],
    size: Sequence[int],
    memory: int,
    batch_size: int,
) -> tuple[TilePlan | None, TilePlan]:
    """Return the best plan that fits in memory, if there is one, and the one that takes the least memory."""
    cuts, fitting, plans = codec.cuts, list[TilePlan](), list[TilePlan]()
    groups = ceil((latent_shape[0] - cuts.first) / cuts.latents)
    lengths = range(min(groups, cuts.fewest), groups + 1)
    for sides in AUTO_SIZES if tile == "auto" else [tile]:
        tiles = [sides] if isinstance(sides, tuple) else [(n * cuts.frames, sides, sides) for n in lengths]
        plans = [TilePlan.of(codec, latent_shape, size, one) for one in tiles]
        fits = bisect_right(plans, memory, key=lambda plan: tiled_bytes(codec, plan, batch_size))
        fitting += plans[:fits][-1:]
        if fits == len(plans):  # smaller ones overlap more
            break
    return min(fitting, key=lambda plan: plan.work, default=None), plans[0]


def tiled_bytes(codec: Tileable, plan: TilePlan, batch_size: int = 1) -> int:
    """Return the peak bytes of decoding by a plan: of the largest tile, and of the video that they become."""
    of_tile = codec.decoding_bytes(plan.latent_shape, batch_size)
    if plan.whole:
        return of_tile
    features = codec.feature_bytes([parts[-1].latents.stop for parts in plan.axes])
    return of_tile + batch_size * (4 * 3 * prod(plan.size) + features)


def sent_bytes(plan: TilePlan, sp: int, cfg: int, rank: int) -> int:
    """Return the bytes that a rank of ``sp``, in the first of ``cfg`` rows, sends to decode a video by a plan."""
    values = [sum(3 * prod(len(part.pixels) for part in tile) for tile in job) for job in plan.jobs()]
    sent = 0
    for begin in range(0, len(values), sp * cfg):
        row = values[begin : begin + sp]
        sent += (sp - 1) * sum(row[rank : rank + 1]) + (cfg - 1) * sum(row)
    return 4 * sent  # float32


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))
