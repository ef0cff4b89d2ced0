"""Sizes of buckets: named resolutions, aspect ratios, batch sizes, and settings that are refused."""

import pytest

from stdit.data.buckets import Bucket
from stdit.data.config import ASPECT_RATIOS, RESOLUTIONS, BucketConfig, DataConfig, resolve_size
from stdit.data.fit import resampled_frames
from stdit.errors import UserError


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


def test_defaults_of_a_bucket():
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
        ({"workers": -1}, "data.workers is -1; it must be auto, 0"),
        ({"max_crop": 1.5}, "data.max_crop is 1.5; it must be between 0"),
        ({"max_crop": float("nan")}, "data.max_crop is nan"),
        ({"batch_multiplier": 0}, "data.batch_multiplier is 0; it must be from 1"),
        (
            {"batch_multiplier": 16384, "buckets": [BucketConfig(batch_size=2)]},
            "batches of 32768 clips; at most",
        ),
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


def test_a_bucket_for_each_aspect_ratio():
    config = DataConfig(buckets=[BucketConfig(resolution="240p", aspect_ratio=["16:9", "1:1"], batch_size=3)])
    assert [bucket.size() for bucket in config.buckets] == [(240, 426), (320, 320)]
    assert {bucket.batch_size for bucket in config.buckets} == {3}
    assert DataConfig(buckets=config.buckets).buckets == config.buckets


def test_tokens_give_the_batch_size():
    bucket = Bucket.from_config(BucketConfig(height=32, width=32, max_tokens=1000))
    assert bucket.sized(300).batch_size == 3 and bucket.sized(1000).batch_size == 1
    assert bucket.sized(1001).batch_size == 1
    assert Bucket(16, 32, 32, 8, batch_size=5).sized(300).batch_size == 5
