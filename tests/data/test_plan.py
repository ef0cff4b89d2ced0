import pickle
from collections import Counter

import numpy as np
import pytest

from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.decoding.media import Media
from stdit.data.manifest.reading import Clip
from stdit.data.plan import BatchPlan


def make_plan(counts=(10, 3), batch_sizes=(4, 2), seed=0, seconds=2.0, windows=1, weight=lambda i: 1.0):
    """One bucket of 16 frames for each count, with sizes 32, 64, ... and that many clips, the i-th of weight(i)."""
    sizes = [32 * (k + 1) for k in range(len(counts))]
    clips = [
        Clip(Media(f"/data/{k}-{i}.mp4"), f"{k} {i}", int(8 * seconds), 8.0, size, size, weight=weight(i))
        for k, (count, size) in enumerate(zip(counts, sizes, strict=True))
        for i in range(count)
    ]
    buckets = [
        Bucket(16, size, size, 8, batch, max_windows=windows)
        for size, batch in zip(sizes, batch_sizes, strict=True)
    ]
    return BatchPlan(assign_clips(clips, buckets), seed)


def items(plan, batch):
    return [plan.item(batch, index, clip_index) for index, clip_index in enumerate(batch.indices)]


def batches(plan, steps):
    return [
        (batch.bucket_index, batch.indices, [item.start for item in items(plan, batch)])
        for batch in map(plan.batch, steps)
    ]


def test_an_epoch_holds_every_clip_in_full_batches():
    plan = make_plan()
    assert plan.steps_per_epoch == 3 + 2 and not plan.notes
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for step in range(epoch * 5, epoch * 5 + 5):
            batch = plan.batch(step)
            assert (batch.step, batch.epoch) == (step, epoch)
            assert len(batch.indices) == batch.bucket.batch_size == len(set(batch.indices))
            assert all(
                item.clip == plan.assignment.clips[i]
                for item, i in zip(items(plan, batch), batch.indices, strict=True)
            )
            assert all(i in plan.assignment.members[batch.bucket_index] for i in batch.indices)
            seen.update(batch.indices)
        assert set(seen) == set(range(13)) and sum(seen.values()) == 3 * 4 + 2 * 2


def test_a_step_is_a_pure_function():
    walked = batches(make_plan(), range(40))
    assert batches(make_plan(), [37]) == [walked[37]]
    plan = make_plan()
    jumps = [39, 0, 17, 18, 3, 17]
    assert batches(plan, jumps) == [walked[step] for step in jumps]
    assert batches(pickle.loads(pickle.dumps(plan)), range(40)) == walked


def test_epochs_and_seeds_have_different_orders():
    plan = make_plan(counts=(40, 40))
    first, second = batches(plan, range(plan.steps_per_epoch)), batches(plan, range(30, 60))
    other = batches(make_plan(counts=(40, 40), seed=1), range(30))
    assert plan.steps_per_epoch == 30
    assert first != second and first != other
    orders = [[bucket for bucket, _, _ in part] for part in (first, second, other)]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert orders[0] not in (sorted(orders[0]), sorted(orders[0], reverse=True)), "buckets are mixed"


def test_a_bucket_smaller_than_its_batch_repeats_clips_with_a_note():
    plan = make_plan(counts=(3,), batch_sizes=(8,))
    assert plan.steps_per_epoch == 1
    assert sorted(Counter(plan.batch(0).indices).values()) == [2, 3, 3]
    assert plan.notes == ["bucket 16x32x32 at 8 fps: 3 clips for batches of 8, so every batch repeats clips"]
    assert plan.notes[0] in plan.report()


def test_an_empty_bucket_has_no_batches():
    plan = make_plan(counts=(4, 0, 2), batch_sizes=(2, 2, 2))
    assert plan.steps_per_epoch == 3
    assert {plan.batch(step).bucket_index for step in range(9)} == {0, 2}


def test_windows_lie_within_the_clip_and_are_reproducible():
    plan = make_plan(counts=(3,), batch_sizes=(6,), seconds=5.0)
    starts = [item.start for step in range(50) for item in items(plan, plan.batch(step))]
    assert all(0 <= start <= 3.0 for start in starts)
    assert min(starts) < 0.2 and max(starts) > 2.8 and len(set(starts)) == len(starts)
    assert starts[:6] == [item.start for item in items(plan, plan.batch(0))]


def test_clips_that_fit_exactly_start_at_zero():
    plan = make_plan()
    assert all(item.start == 0 for step in range(5) for item in items(plan, plan.batch(step)))


def test_replacements_are_the_other_clips_of_the_bucket_from_the_next_on():
    plan = make_plan(counts=(10,), batch_sizes=(4,))
    batch = plan.batch(0)
    stand_ins = list(plan.replacements(0, 1))
    assert stand_ins[:2] == batch.indices[2:]
    assert sorted([batch.indices[1], *stand_ins]) == list(range(10))


def epoch(plan, number):
    """How often each clip of a plan of full batches is drawn in an epoch."""
    steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
    return Counter(index for step in steps for index in plan.batch(step).indices)


def test_a_whole_weight_is_how_often_a_clip_is_drawn():
    plan = make_plan(counts=(20,), batch_sizes=(5,), weight=lambda i: (1.0, 3.0)[i % 2])
    assert plan.steps_per_epoch == (10 * 1 + 10 * 3) / 5
    for number in range(3):
        assert all(epoch(plan, number)[i] == (1, 3)[i % 2] for i in range(20))


def test_fractional_weights_are_drawn_per_epoch_and_reproducible():
    weights = (0.25, 1.5, 1.0, 2.25)  # 5 in all, of 10 clips each
    plan = make_plan(counts=(40,), batch_sizes=(5,), weight=lambda i: weights[i % 4])
    again = make_plan(counts=(40,), batch_sizes=(5,), weight=lambda i: weights[i % 4])
    assert plan.steps_per_epoch == 10
    epochs = [epoch(plan, number) for number in range(100)]
    assert [epoch(again, number) for number in (99, 3)] == [epochs[99], epochs[3]]
    assert all(sum(drawn.values()) == 50 for drawn in epochs) and epochs[0] != epochs[1]
    for i in range(40):
        counts = [drawn[i] for drawn in epochs]
        assert set(counts) <= {int(weights[i % 4]), int(weights[i % 4]) + 1}
        assert abs(sum(counts) / 100 - weights[i % 4]) < 0.2
    assert batches(plan, [17]) == batches(again, [17])


def test_weights_that_sum_to_little_still_give_a_batch():
    plan = make_plan(counts=(3,), batch_sizes=(2,), weight=lambda i: 0.1)
    assert plan.steps_per_epoch == 1 and len(plan.batch(0).indices) == 2
    assert plan.notes == ["bucket 16x32x32 at 8 fps: 1 clips for batches of 2, so every batch repeats clips"]


def test_clips_not_drawn_because_of_weights_are_the_last_replacements():
    plan = make_plan(counts=(10,), batch_sizes=(2,), weight=lambda i: 0.4)
    first = epoch(plan, 0)
    assert len(first) == 4
    stand_ins = list(plan.replacements(0, 0))
    assert set(stand_ins[:3]) < set(first) and set(stand_ins) == set(range(10))


def test_each_window_of_an_epoch_lies_in_its_own_part_of_the_clip():
    plan = make_plan(counts=(4,), batch_sizes=(3,), seconds=7.0, windows=16)
    assert plan.steps_per_epoch == 4
    read = [item for step in range(4) for item in items(plan, plan.batch(step))]
    for name in range(4):
        starts = sorted(item.start for item in read if item.clip.text == f"0 {name}")
        assert len(starts) == 3 and all(
            later - start >= 2 for start, later in zip(starts, starts[1:], strict=False)
        )
        assert all(0 <= start <= 5 for start in starts) and len({start % 1 for start in starts}) == 3


def test_tokens_size_the_batches():
    plan = make_plan(batch_sizes=(1, 1))
    for bucket in plan.assignment.buckets:
        object.__setattr__(bucket, "max_tokens", 5000)
    sized = plan.sized(lambda bucket: bucket.height**2)
    assert [bucket.batch_size for bucket in sized.assignment.buckets] == [4, 1]
    assert sized.steps_per_epoch == 3 + 3 and len(sized.batch(0).indices) == sized.batch(0).bucket.batch_size
    assert not sized.notes
    assert plan.sized(lambda bucket: 5001).notes == [
        f"bucket 16x{size}x{size} at 8 fps: one clip has 5,001 tokens, more than max_tokens = 5,000"
        for size in (32, 64)
    ]


@pytest.mark.parametrize("step", [10**6, 10**12])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_far_steps_are_found_without_earlier_ones(step, weight, monkeypatch):
    plan = make_plan(counts=(1000, 500), batch_sizes=(4, 2), weight=lambda i: weight)
    streams = []
    monkeypatch.setattr(np.random, "default_rng", counting(np.random.default_rng, streams))
    plan.batch(step)
    assert len(streams) <= 2 + (weight != 1), "the order of the epoch, that of the bucket, and its draws"
    near = len(streams)
    list(map(plan.batch, range(step + 1, step + 20)))
    orders = {(step + i) // plan.steps_per_epoch for i in range(20)}
    assert len(streams) - near <= len(orders) * 5, "orders are kept while their epoch lasts"


def counting(make, made):
    """As `make`, but each call is noted in `made`."""

    def noted(*args):
        made.append(args)
        return make(*args)

    return noted
