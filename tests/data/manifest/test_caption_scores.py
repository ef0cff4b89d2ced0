import pytest

from stdit.data.manifest.caption_scores import score_suffix


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ({}, ""),
        ({"aesthetic": None, "motion": "nan", "camera": " "}, ""),
        ({"motion": 5, "aesthetic": 6.5}, " aesthetic score: 6.5. motion score: 5."),
        ({"camera": "pan left", "motion": 5}, " motion score: 5. camera motion: pan left."),
        ({"aesthetic": "5.2345678", "motion": "7.04"}, " aesthetic score: 5.2. motion score: 7."),
        ({"aesthetic": "good"}, " aesthetic score: good."),
    ],
)
def test_scores_are_appended_in_open_soras_format(values, suffix):
    assert score_suffix(values) == suffix
