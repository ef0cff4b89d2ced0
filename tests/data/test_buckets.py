import pytest

from stdit.data.assignment import assign_clips
from stdit.data.buckets import Bucket
from stdit.data.config import ASPECT_RATIOS, RESOLUTIONS, BucketConfig, DataConfig, resolve_size
from stdit.data.decoding.media import Media
from stdit.data.fit import resampled_frames
from stdit.data.manifest.reading import Clip, Skipped
from stdit.errors import UserError


def clip(num_frames=16, fps=8.0, height=64, width=64, name="a.mp4", **rest):
    return Clip(Media(f"/data/{name}"), "text", num_frames, fps, height, width, **rest)


def places(clips, buckets, **options):
    """For each clip the place of its bucket, None where it was dropped."""
    assignment = assign_clips(clips, buckets, **options)
    found = {int(index): k for k, members in enumerate(assignment.members) for index in members}
    assert len(found) + len(assignment.dropped) == len(clips)
    return [found.get(index) for index in range(len(clips))]


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "size"),
    [("240p", "16:9", (240, 426)), ("240p", "9:16", (426, 240)), ("240p", "1:1", (320, 320)),
     ("480p", "16:9", (480, 854)), ("720p", "16:9", (720, 1280)), ("144p", "16:9", (144, 256)),
     ("256", "1:1", (256, 256))],
)  # fmt: skip
def test_named_resolutions(resolution, aspect_ratio, size):
    assert resolve_size(resolution, aspect_ratio) == size


OPEN_SORA = {  # height x width
    "144p": ("125x291", "144x256", "156x234", "166x221", "192x192", "221x165", "235x156", "256x144"),
    "240p": ("210x490", "240x426", "262x393", "276x368", "320x320", "370x278", "392x262", "426x240"),
    "360p": ("314x732", "360x640", "392x588", "416x554", "480x480", "554x416", "588x392", "640x360"),
    "480p": ("420x980", "480x854", "522x784", "554x738", "640x640", "740x555", "784x522", "854x480"),
    "720p": ("628x1466", "720x1280", "784x1176", "832x1110", "960x960", "1108x832", "1176x784", "1280x720"),
    "1080p": ("942x2198", "1080x1920", "1176x1764", "1248x1664", "1440x1440", "1662x1246", "1764x1176", "1920x1080"),
}  # fmt: skip
"""Sizes that Open-Sora v1.2 was trained on, in the order of ASPECT_RATIOS."""


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_one_rule_gives_open_soras_sizes(resolution):
    for aspect_ratio, text in zip(ASPECT_RATIOS, OPEN_SORA[resolution], strict=True):
        theirs = tuple(map(int, text.split("x")))
        ours = resolve_size(resolution, aspect_ratio)
        off = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert off <= (0 if aspect_ratio in ("16:9", "1:1", "9:16") else 3), (aspect_ratio, ours)
        assert all(side % 2 == 0 for side in ours)


def test_a_bucket_of_which_nothing_is_said():
    assert Bucket.from_config(BucketConfig()) == Bucket(16, 256, 256, 8)


def test_sizes_are_multiples():
    assert resolve_size("240p", "16:9", multiple=16) == (240, 432)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0; it must be from 1 to 16384"),
        ({"num_frames": 10**20}, "num_frames is 100000000000000000000; it must be from 1 to 16384"),
        ({"batch_size": 0}, "batch_size is 0; it must be from 1 to 16384"),
        ({"batch_size": 10**20}, "batch_size is 100000000000000000000"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": 1e300}, "fps is 1e"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"keep_probability": 0.0}, "keep_probability is 0.0"),
        ({"keep_probability": 1.5}, "keep_probability is 1.5"),
        ({"max_windows": 0}, "max_windows is 0; it must be from 1 to 16384"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1"),
        ({"max_tokens": 10**20}, "max_tokens is 100000000000000000000"),
        ({"max_tokens": 4096, "batch_size": 2}, "batch_size is 2 and max_tokens is 4096; give one of them"),
        ({"height": 0}, "each must be from 1 to 16384"),
        ({"width": 10**20}, "100000000000000000000x32 pixels"),
        ({"width": None}, "give both"),
        ({"resolution": "240p"}, "give either"),
        ({"height": None, "width": None, "resolution": "24op"}, "'24op' is unknown"),
        ({"height": None, "width": None, "resolution": "0p"}, "'0p' is unknown"),
        ({"height": None, "width": None, "resolution": "9" * 5000}, "99' is unknown"),
        ({"height": None, "width": None, "resolution": "16384"}, "21846x12288 pixels"),
        ({"height": None, "width": None, "resolution": "240p", "aspect_ratio": "wide"}, "'wide' is unknown"),
        ({"height": None, "width": None, "resolution": "240p", "aspect_ratio": "16:0"}, "'16:0' is unknown"),
    ],
)
def test_impossible_buckets(values, message):
    with pytest.raises(UserError, match=message):
        Bucket.from_config(BucketConfig(**{"height": 32, "width": 32, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"manifest": ""}, "data.manifest is empty"),
        ({"buckets": []}, "data.buckets is empty"),
        ({"workers": -1}, "data.workers is -1"),
        ({"max_skipped_share": 2.0}, "data.max_skipped_share is 2.0"),
    ],
)
def test_impossible_data(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{"manifest": "a.csv", **values}).validate()


def test_frames_after_resampling():
    assert resampled_frames(16, 8, 8) == 16
    assert resampled_frames(250, 25, 8) == 80
    assert resampled_frames(120, 30000 / 1001, 30) == 120
    assert resampled_frames(120, 30, 30000 / 1001) == 120
    assert resampled_frames(1, 30, 8) == 1


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


def test_a_bucket_for_each_aspect_ratio():
    config = DataConfig(buckets=[BucketConfig(resolution="240p", aspect_ratio=["16:9", "1:1"], batch_size=3)])
    assert [bucket.size() for bucket in config.buckets] == [(240, 426), (320, 320)]
    assert {bucket.batch_size for bucket in config.buckets} == {3}
    assert DataConfig(buckets=config.buckets).buckets == config.buckets


def test_nearest_aspect_ratio_of_a_resolution():
    buckets = [Bucket(16, *resolve_size("240p", ratio), 8) for ratio in ("1:1", "16:9", "9:16")]
    clips = [clip(height=h, width=w) for h, w in [(720, 1280), (1280, 720), (700, 720), (500, 600)]]
    assert places(clips, buckets) == [1, 2, 0, 0]


def test_keep_probability_is_drawn_from_seed_and_passes_clips_on():
    clips = [clip(name=f"{i}.mp4") for i in range(400)]
    buckets = [Bucket(16, 64, 64, 8, keep_probability=0.25), Bucket(16, 32, 32, 8, keep_probability=0.5)]
    found = places(clips, buckets, seed=3)
    assert found == places(clips, buckets, seed=3) != places(clips, buckets, seed=4)
    assert 60 < found.count(0) < 140 and 110 < found.count(1) < 190
    reasons = {reason for _, reason in assign_clips(clips, buckets, seed=3).dropped}
    assert reasons == {"left out by keep_probability"}


def test_table_says_what_is_kept_and_what_is_not():
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


def test_a_clip_three_times_as_long_serves_three_windows_each_in_its_own_third():
    assert windows_of([clip(num_frames=48)]) == [(0, 16), (2, 16), (4, 16)]
    assert windows_of([clip(num_frames=47)]) == [(0, 23), (23 / 8, 24)]
    assert windows_of([clip(num_frames=17), clip(num_frames=33)]) == [(0, 17), (0, 16), (2, 17)]
    assert windows_of([clip(num_frames=144, fps=24.0)]) == [(0, 48), (2, 48), (4, 48)], "after resampling"
    assert windows_of([clip(num_frames=48, start=10.0, end=16.0)]) == [(10, 16), (12, 16), (14, 16)]


def test_windows_are_an_option_and_have_a_limit():
    assert windows_of([clip(num_frames=480)], windows=1) == [(0, 480)]
    assert windows_of([clip(num_frames=480)], windows=4) == [(0, 120), (15, 120), (30, 120), (45, 120)]


def test_only_the_bucket_that_takes_a_clip_divides_it():
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


def test_a_clip_of_weight_0_is_left_out_and_said_to_be():
    assignment = assign_clips([clip(), clip(weight=0.0)], [Bucket(16, 32, 32, 8)])
    assert assignment.members[0].tolist() == [0]
    assert [reason for _, reason in assignment.dropped] == ["its weight is 0"]


def test_tokens_give_the_batch_size():
    bucket = Bucket.from_config(BucketConfig(height=32, width=32, max_tokens=1000))
    assert bucket.sized(300).batch_size == 3 and bucket.sized(1000).batch_size == 1
    assert bucket.sized(1001).batch_size == 1
    assert Bucket(16, 32, 32, 8, batch_size=5).sized(300).batch_size == 5


def test_the_table_shows_windows_draws_tokens_and_sources_where_they_say_something():
    clips = [
        clip(num_frames=48, weight=2.0, name="a/1.mp4"),
        Clip(Media("/more/2.mp4", root="/more"), "text", 32, 8.0, 64, 64, weight=0.5),
    ]
    buckets = [Bucket(16, 64, 64, 8, max_windows=8, max_tokens=2500).sized(1000), Bucket(64, 64, 64, 8)]
    lines = assign_clips(clips, buckets).table().splitlines()
    assert lines[0].split()[6:] == "clips windows drawn batch steps an epoch tokens max_tokens".split()
    assert lines[1].split()[4:] == ["2", "5", "7", "2", "4", "2000", "2500"]
    assert lines[3:] == [
        "3 windows from None, weight 2: 6 draws an epoch",
        "2 windows from /more, weight 0.5: 1 draws an epoch",
    ]
    plain = assign_clips([clip()], [Bucket(16, 64, 64, 8)]).table().splitlines()
    assert plain[0].split()[6:] == "clips batch steps an epoch".split() and len(plain) == 2


def test_many_clips_are_assigned_as_a_few_are(monkeypatch):
    clips = [clip(num_frames=8 + i % 30, height=30 + i % 50, name=f"{i}.mp4") for i in range(100)]
    buckets = [Bucket(16, 48, 48, 8, keep_probability=0.5), Bucket(16, 32, 32, 8, keep_probability=0.5)]
    at_once = assign_clips(clips, buckets)
    monkeypatch.setattr("stdit.data.assignment.CLIPS_PER_CHUNK", 7)
    in_parts = assign_clips(clips, buckets)
    assert [part.tolist() for part in in_parts.members] == [part.tolist() for part in at_once.members]
    assert list(in_parts.dropped) == list(at_once.dropped)
