"""The plan of fixed data never changes: order, windows and crops, bit for bit.

A run that is resumed after an update of stdit must see the batches that it would have seen.
"""

import hashlib
import json

import pytest

from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.decoding.media import Media
from stdit.data.manifest.reading import Clip
from stdit.data.plan import BatchPlan

BUCKETS = [
    Bucket(16, 64, 64, 8, batch_size=4, keep_probability=0.7),
    Bucket(16, 48, 84, 8, batch_size=3),
    Bucket(1, 96, 96, 8, batch_size=5),
    Bucket(8, 32, 32, 12, batch_size=2, keep_probability=0.9),
    Bucket(8, 16, 16, 8, batch_size=7),
]


def clips() -> list[Clip]:
    """300 clips of many lengths, rates and sizes; some fit no bucket."""
    return [
        Clip(
            Media(f"/data/{i}.mp4"),
            f"clip {i}",
            num_frames=1 + i * 7 % 131,
            fps=(8.0, 12.5, 24.0, 30000 / 1001, 5.0)[i % 5],
            height=12 + i * 11 % 113,
            width=12 + i * 17 % 127,
        )
        for i in range(300)
    ]


def digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def facts(plan: BatchPlan, step: int) -> list[object]:
    batch = plan.batch(step)
    items = [plan.item(batch, index, clip_index) for index, clip_index in enumerate(batch.indices)]
    starts = [item.start.hex() for item in items]
    crops = [plan.crop_seed(step, index) for index in range(len(batch.indices))]
    stand_ins = list(plan.replacements(step, 1))[:5]
    return [step, batch.epoch, batch.bucket_index, batch.indices, starts, crops, stand_ins]


@pytest.mark.parametrize(
    ("seed", "allow_upscale", "members", "dropped", "batches"),
    [
        (0, False, "761cfa4729f7123f", "eb3775b7d7957abb", "213c516f0967c2c5"),
        (0, True, "0aa4f63b7c329ccc", "4f53cda18c2baa0c", "1f4cb7f31bb28cad"),
        (42, False, "d0ba434a11cfa6fe", "7aed0fe79b4d6686", "ba52ad6a4f030f0e"),
        (42, True, "e7598adeea3f8f55", "4f53cda18c2baa0c", "8883ff1ad13b7935"),
    ],
)
def test_the_plan_is_unchanged(seed, allow_upscale, members, dropped, batches):
    assignment = assign_clips(clips(), BUCKETS, seed, allow_upscale)
    plan = BatchPlan(assignment, seed)
    assert digest([part.tolist() for part in assignment.members]) == members
    assert digest([[str(clip.media), reason] for clip, reason in assignment.dropped]) == dropped
    steps = [*range(2 * plan.steps_per_epoch), 10**5, 10**9]
    assert digest([facts(plan, step) for step in steps]) == batches


def test_one_batch_in_full():
    assert facts(BatchPlan(assign_clips(clips(), BUCKETS, 42, allow_upscale=True), 42), 17) == [
        17, 0, 1,
        [199, 274, 86],
        ["0x1.cca049e4d224bp+3", "0x1.5a499603406afp+3", "0x1.fede7b2005c79p+0"],
        [6093891287225846804, 3897721543966348746, 8269578675933475497],
        [86, 65, 11, 12, 197],
    ]  # fmt: skip
