import pytest

from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.views import AugmentedView, augmented_view, count_augmented_views, may_mirror

CLIP = Clip(Media("a.mp4"), "a dog", num_frames=32, fps=8.0, height=32, width=48)
BUCKET = Bucket(16, 32, 32, 8.0)


@pytest.mark.parametrize(
    "caption",
    [
        "a car drives to the left",
        "Right-hand traffic",
        "the camera pans leftwards",
        "hands turn clockwise",
        "a ship heads west",
        "a shop with a sign",
        "a man reads",
        "the TITLE of a film",
        'a shirt that says "hello"',
        "a wall with “open” on it",
    ],
)
def test_a_caption_of_sides_or_writing_is_not_mirrored(caption):
    assert not may_mirror(caption)


@pytest.mark.parametrize(
    "caption",
    ["a dog runs", "bright light", "leftover soup", "a signal fire", "the copyright", "it's a sword", ""],
)
def test_other_captions_are(caption):
    assert may_mirror(caption)


def test_the_first_view_is_the_middle_and_the_others_spread():
    config = DataConfig(augmented_views=8, crop="random", cache="disk")
    views = [augmented_view(config, number, CLIP, BUCKET) for number in range(8)]
    assert views[0] == AugmentedView(1.0, 0.5, 0.5, False)  # 2 seconds of 4
    for values, largest in (
        (sorted(v.start / 2 for v in views), 0.3),
        (sorted(v.across for v in views), 0.3),
    ):
        assert 0 <= values[0] and values[-1] <= 1
        assert max(b - a for a, b in zip([0.0, *values], [*values, 1.0], strict=True)) < largest
    assert {view.down for view in views} == {0.5}  # only columns are cut off
    assert {
        v.across
        for v in (
            augmented_view(DataConfig(augmented_views=8, cache="disk"), n, CLIP, BUCKET) for n in range(8)
        )
    } == {0.5}


def test_views_of_a_clip_without_slack_are_equal():
    config = DataConfig(augmented_views=5, crop="random", cache="disk")
    exact = Clip(Media("a.mp4"), "", num_frames=16, fps=8.0, height=64, width=64, start=3.0)
    assert {augmented_view(config, number, exact, BUCKET) for number in range(5)} == {AugmentedView(3.0)}


def test_mirror_images_come_after_the_views():
    config = DataConfig(augmented_views=3, flip=True, cache="disk")
    assert (
        count_augmented_views(config, "a dog") == 6
        and count_augmented_views(config, "a dog to the left") == 3
    )
    for number in range(3):
        one, other = (augmented_view(config, n, CLIP, BUCKET) for n in (number, number + 3))
        assert not one.mirrored and other == one._replace(mirrored=True)
