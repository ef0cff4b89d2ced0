"""Which clip goes into which bucket, which go into none and why, and how large batches are."""

from pathlib import Path

import pytest

from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.config import resolve_size
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.manifest.reading import Skipped
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.training.config import parse_train

ROOT = Path(__file__).parents[2]


def clip(num_frames=16, fps=8.0, height=64, width=64, name="a.mp4", **rest):
    return Clip(Media(f"/data/{name}"), "text", num_frames, fps, height, width, **rest)


def places(clips, buckets, **options):
    """For each clip the place of its bucket, None where it was dropped."""
    assignment = assign_clips(clips, buckets, **options)
    found = {int(index): k for k, members in enumerate(assignment.members) for index in members}
    assert len(found) + len(assignment.dropped) == len(clips)
    return [found.get(index) for index in range(len(clips))]


def test_largest_bucket_that_can_be_filled():
    buckets = [Bucket(8, 32, 32, 8), Bucket(16, 64, 64, 8), Bucket(16, 32, 32, 8), Bucket(1, 32, 32, 8)]
    clips = [
        clip(),
        clip(num_frames=100, height=720, width=1280),
        clip(height=63, width=300),  # more pixels than 64x64, but it would be enlarged
        clip(height=40, width=40),
        clip(num_frames=15),
        clip(num_frames=1, fps=1.0),
        clip(num_frames=48, fps=24.0),
    ]
    assert places(clips, buckets) == [1, 1, 1, 2, 0, 3, 1]


def test_reasons_for_dropping():
    buckets = [Bucket(16, 64, 64, 8), Bucket(32, 32, 32, 8)]
    clips = [
        clip(num_frames=48, height=80, width=80),
        clip(num_frames=12),
        clip(height=16, width=16),
        clip(num_frames=40, fps=5.0),
        clip(num_frames=16, height=40, width=40),
    ]
    reasons = [reason for _, reason in assign_clips(clips, buckets).dropped]
    assert reasons[0] == "too short: 12 frames at 8 fps, the shortest bucket needs 16"
    assert reasons[1].startswith("too small: 16x16 pixels (width x height), the smallest bucket needs 32x32")
    assert reasons[2].startswith("frame rate too low: 5 fps, the slowest bucket needs 8")
    assert reasons[3].startswith("no bucket is short, small and slow enough at once: 16 frames of 40x40")


def test_upscaling_is_an_option():
    buckets = [Bucket(16, 64, 64, 8)]
    clips = [clip(), clip(height=16, width=16), clip(num_frames=40, fps=5.0), clip(num_frames=4)]
    assert places(clips, buckets) == [0, None, None, None]
    assert places(clips, buckets, allow_upscale=True) == [0, 0, 0, None]


def test_standard_sizes_just_below_fit():
    assert (
        places([clip(height=240, width=424), clip(fps=29.97, num_frames=120)], [Bucket(16, 240, 426, 8)])[0]
        == 0
    )
    assert places([clip(fps=29.97, num_frames=120)], [Bucket(120, 64, 64, 30)]) == [0]


LANDSCAPE, SQUARE, PORTRAIT = Bucket(16, 144, 256, 8), Bucket(16, 96, 96, 8), Bucket(16, 128, 72, 8)
SHAPES = [LANDSCAPE, SQUARE, PORTRAIT]


def test_aspect_wins_over_size():
    clips = [
        clip(height=h, width=w) for h, w in [(640, 360), (720, 720), (720, 1280), (480, 640), (150, 600)]
    ]
    assert places(clips, SHAPES, bucket_choice="aspect") == [2, 1, 0, 0, 0], (
        "4:3 loses as much in both: the larger"
    )
    assert places(clips, SHAPES, bucket_choice="size") == [0, 0, 0, 0, 0], "Open-Sora's rule"


def test_a_video_goes_to_a_bucket_of_images_only_if_no_other_takes_it():
    buckets = [Bucket(16, 144, 256, 8), Bucket(1, 256, 256, 8)]
    clips = [
        clip(height=720, width=720),
        clip(height=720, width=720, num_frames=1),
        clip(num_frames=9, height=720),
    ]
    assert places(clips, buckets[:1] + [Bucket(1, 64, 64, 8)], bucket_choice="aspect") == [0, 1, 1]
    assert places(clips[:2], buckets, bucket_choice="aspect") == [0, 1]


def test_a_clip_that_would_lose_too_much_goes_elsewhere_or_is_dropped_with_the_reason():
    clips = [clip(height=720, width=720, name="square.mp4"), clip(height=640, width=360, name="tall.mp4")]
    assert places(clips, [LANDSCAPE, PORTRAIT]) == [0, 0]
    for choice in ("aspect", "size"):
        assert places(clips, [LANDSCAPE, PORTRAIT], max_crop=0.5, bucket_choice=choice) == [0, 1]
    assignment = assign_clips(clips, [LANDSCAPE, PORTRAIT], max_crop=0.3)
    assert list(assignment.dropped)[0][1] == (
        "too much would be cut: 44% of 720x720 pixels (width x height) to fill 16x144x256 at 8 fps, and "
        "data.max_crop is 0.3; add a bucket of its aspect_ratio"
    )
    assert "1 x too much would be cut: /data/square.mp4 (44% of 720x720" in assignment.table()
    assert places([clip(height=720, width=960)], [LANDSCAPE], max_crop=0.25) == [0], "just as much"


def test_the_table_shows_what_is_cut():
    clips = [clip(height=720, width=1280), clip(height=640, width=360, name="tall.mp4")]
    table = assign_clips(clips, [LANDSCAPE, SQUARE]).table()
    assert table.splitlines()[3:] == [
        "cut away for the bucket's aspect ratio (data.max_crop is the limit):",
        "  16x144x256 at 8 fps: 34% of the picture on average, at most 68% (/data/tall.mp4, 360x640 pixels)",
    ]
    assert "cut" not in assign_clips(clips[:1], [LANDSCAPE]).table()


def test_aspect_ratios_of_a_resolution_share_the_draw_of_keep_probability():
    """Otherwise a clip that 16:9 leaves would go to 3:2, cut, and not to a smaller bucket."""
    ratios = [
        Bucket(16, *resolve_size("240p", ratio), 8, keep_probability=0.25) for ratio in ("16:9", "3:2", "4:3")
    ]
    found = places([clip(height=720, width=1280, name=f"{i}.mp4") for i in range(400)], [*ratios, LANDSCAPE])
    assert 60 < found.count(0) < 140 and set(found) == {0, 3}


def test_own_clips_has_buckets_for_portrait_square_and_landscape():
    """A portrait of 360x640 lost 68% of its picture to 16:9."""
    data = parse_train(
        [f"--config={ROOT / 'configs' / 'train' / 'own-clips.yaml'}", "--data.manifest=a.csv"]
    ).data
    buckets = [Bucket.from_config(bucket) for bucket in data.buckets]
    sizes = [(640, 360), (720, 1280), (720, 720), (144, 176), (128, 72), (480, 640), (100, 900)]
    clips = [clip(height=h, width=w, name=f"{w}x{h}.mp4") for h, w in sizes]
    rules = dict(bucket_choice=data.bucket_choice, max_crop=data.max_crop)
    found = places(clips, buckets, **rules)
    assert [None if k is None else (buckets[k].height, buckets[k].width) for k in found] == [
        *((256, 144), (144, 256), (192, 192), (96, 96), (128, 72), (192, 192)),
        None,
    ]
    cut = assign_clips(clips, buckets, **rules)
    assert max(float(cut.cropped_shares(k).max(initial=0)) for k in range(len(buckets))) <= 0.25
    assert [reason.partition(":")[0] for _, reason in cut.dropped] == ["too much would be cut"]


def test_open_soras_stages_keep_their_rule():
    assert stage_1(1).bucket_choice == "size" and stage_1(1).max_crop == 1


def test_nearest_aspect_ratio_of_a_resolution():
    buckets = [Bucket(16, *resolve_size("240p", ratio), 8) for ratio in ("1:1", "16:9", "9:16")]
    clips = [clip(height=h, width=w) for h, w in [(720, 1280), (1280, 720), (700, 720), (500, 600)]]
    assert places(clips, buckets) == [1, 2, 0, 0]


def test_keep_probability_depends_on_the_seed_and_leaves_clips_to_smaller_buckets():
    clips = [clip(name=f"{i}.mp4") for i in range(400)]
    buckets = [Bucket(16, 64, 64, 8, keep_probability=0.25), Bucket(16, 32, 32, 8, keep_probability=0.5)]
    found = places(clips, buckets, seed=3)
    assert found == places(clips, buckets, seed=3) != places(clips, buckets, seed=4)
    assert 60 < found.count(0) < 140 and 110 < found.count(1) < 190
    reasons = {reason for _, reason in assign_clips(clips, buckets, seed=3).dropped}
    assert reasons == {"excluded by keep_probability"}


def test_the_table_lists_kept_and_dropped_clips():
    clips = [clip(name=f"{i}.mp4") for i in range(5)] + [clip(num_frames=12, name="short.mp4")]
    buckets = [Bucket(16, 64, 64, 8, batch_size=2), Bucket(32, 64, 64, 8)]
    table = assign_clips(clips, buckets, skipped=[Skipped("gone.mp4", "file missing")]).table().splitlines()
    assert table[1].split() == ["16x64x64", "at", "8", "fps", "5", "2", "3"]
    assert table[2].split() == ["32x64x64", "at", "8", "fps", "0", "1", "0"]
    rest = "\n".join(table[3:])
    assert "1 x too short: /data/short.mp4 (12 frames at 8 fps, the shortest bucket needs 16)" in rest
    assert "1 x file missing: gone.mp4" in rest


def test_nothing_left_is_an_error_with_the_reasons():
    with pytest.raises(UserError, match=r"(?s)no clip is left.*1 x too short: .*1 x file missing: gone"):
        assign_clips([clip(num_frames=2)], [Bucket(16, 32, 32, 8)], skipped=[Skipped("gone", "file missing")])


def windows_of(clips, windows=16, **options):
    """(start, frames) of what a bucket of 16 frames at 8 fps makes of clips."""
    assignment = assign_clips(clips, [Bucket(16, 32, 32, 8, max_windows=windows)], **options)
    return [(part.start, part.num_frames) for part in assignment.clips]


def test_a_clip_three_times_as_long_gives_three_windows_each_in_its_own_third():
    assert windows_of([clip(num_frames=48)]) == [(0, 16), (2, 16), (4, 16)]
    assert windows_of([clip(num_frames=47)]) == [(0, 23), (23 / 8, 24)]
    assert windows_of([clip(num_frames=17), clip(num_frames=33)]) == [(0, 17), (0, 16), (2, 17)]
    assert windows_of([clip(num_frames=144, fps=24.0)]) == [(0, 48), (2, 48), (4, 48)], "after resampling"
    assert windows_of([clip(num_frames=48, start=10.0, end=16.0)]) == [(10, 16), (12, 16), (14, 16)]


def test_windows_are_an_option_and_have_a_limit():
    assert windows_of([clip(num_frames=480)], windows=1) == [(0, 480)]
    assert windows_of([clip(num_frames=480)], windows=4) == [(0, 120), (15, 120), (30, 120), (45, 120)]


def test_only_the_bucket_that_takes_a_clip_splits_it():
    buckets = [Bucket(32, 64, 64, 8), Bucket(16, 32, 32, 8, max_windows=3)]
    clips = [clip(num_frames=64), clip(num_frames=64, height=40, name="b.mp4"), clip(num_frames=2)]
    assignment = assign_clips(clips, buckets)
    assert [part.tolist() for part in assignment.members] == [[0], [1, 2, 3]]
    assert [part.media.location for part in assignment.clips] == [
        "/data/a.mp4",
        *["/data/b.mp4"] * 3,
        "/data/a.mp4",
    ]
    assert assignment.clip_counts == [1, 1] and assignment.kept == 4
    assert assignment.files == 2, "of which a share may fail"
    assert [reason for _, reason in assignment.dropped] == [
        "too short: 2 frames at 8 fps, the shortest bucket needs 16"
    ]
    assert [part.end for part in assignment.clips][1:4] == [21 / 8, 42 / 8, None]


def test_a_clip_of_weight_0_is_dropped_with_the_reason():
    assignment = assign_clips([clip(), clip(weight=0.0)], [Bucket(16, 32, 32, 8)])
    assert assignment.members[0].tolist() == [0]
    assert [reason for _, reason in assignment.dropped] == ["its weight is 0"]


def test_the_table_shows_windows_draws_tokens_and_sources_only_if_they_differ():
    clips = [
        clip(num_frames=48, weight=2.0, name="a/1.mp4"),
        Clip(Media("/more/2.mp4", root="/more"), "text", 32, 8.0, 64, 64, weight=0.5),
    ]
    buckets = [Bucket(16, 64, 64, 8, max_windows=8, max_tokens=2500).sized(1000), Bucket(64, 64, 64, 8)]
    lines = assign_clips(clips, buckets).table().splitlines()
    assert lines[0].split()[6:] == "clips windows drawn batch steps/epoch tokens max_tokens".split()
    assert lines[1].split()[4:] == ["2", "5", "7", "2", "4", "2000", "2500"]
    assert lines[3:] == [
        "3 windows from None, weight 2: 6 draws per epoch",
        "2 windows from /more, weight 0.5: 1 draws per epoch",
    ]
    plain = assign_clips([clip()], [Bucket(16, 64, 64, 8)]).table().splitlines()
    assert plain[0].split()[6:] == "clips batch steps/epoch".split() and len(plain) == 2


def test_clips_are_assigned_the_same_in_chunks(monkeypatch):
    clips = [clip(num_frames=8 + i % 30, height=30 + i % 50, name=f"{i}.mp4") for i in range(100)]
    buckets = [Bucket(16, 48, 48, 8, keep_probability=0.5), Bucket(16, 32, 32, 8, keep_probability=0.5)]
    at_once = assign_clips(clips, buckets)
    monkeypatch.setattr("stdit.data.assignment.CLIPS_PER_CHUNK", 7)
    in_parts = assign_clips(clips, buckets)
    assert [part.tolist() for part in in_parts.members] == [part.tolist() for part in at_once.members]
    assert list(in_parts.dropped) == list(at_once.dropped)


def test_buckets_without_clips_do_not_count_against_the_number_of_ranks():
    buckets = [Bucket(16, 64, 64, 8, batch_size=4), Bucket(32, 64, 64, 8, batch_size=1)]
    assignment = assign_clips([clip(), clip(name="b.mp4")], buckets)
    assert assignment.used_buckets == buckets[:1]
    Mesh(world_size=4).check_batch_sizes(bucket.batch_size for bucket in assignment.used_buckets)


def stage_1(multiplier: int):
    """Data settings of the first stage of Open-Sora's recipe."""
    files = [f"--config={ROOT / 'configs' / 'train' / name}.yaml" for name in ("opensora", "opensora-stage1")]
    return parse_train([*files, "--data.manifest=a.csv", f"--data.batch_multiplier={multiplier}"]).data


def test_a_multiplier_lets_stage_1_of_open_sora_train_on_four_ranks():
    clips = [clip(408, 24.0, height, 16 * height // 9, f"{i}.mp4") for i, height in enumerate([360] * 300)]
    mesh = Mesh(world_size=4)

    def check(multiplier: int) -> list[Bucket]:
        buckets = [Bucket.from_config(bucket) for bucket in stage_1(multiplier).multiplied_buckets()]
        used = assign_clips(clips, buckets).used_buckets
        mesh.check_batch_sizes(bucket.batch_size for bucket in used)
        return used

    with pytest.raises(UserError, match=r"batch_size = 1, .* 4 parts.* raise data.batch_multiplier"):
        check(1)
    used = check(4)
    assert min(bucket.batch_size for bucket in used) == 4 and len(used) > 5


def test_the_multiplier_multiplies_clips_or_tokens_of_every_bucket():
    data = stage_1(3)
    assert [b.batch_size for b in data.multiplied_buckets()] == [3 * b.batch_size for b in data.buckets]
    assert data.largest_batch_size() == [3 * 475]
    data.buckets[0].batch_size, data.buckets[0].max_tokens = 1, 1000
    assert [(b.batch_size, b.max_tokens) for b in data.multiplied_buckets()][0] == (1, 3000)
    assert data.largest_batch_size() == [], "tokens decide"
