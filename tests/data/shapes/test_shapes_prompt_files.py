"""Prompt files that cannot be scored by."""

import shutil
from pathlib import Path

import pytest

from stdit.data.shapes.prompt_files import read_expected
from stdit.errors import UserError

HEADER = "prompt,shape,colour,motion,background,relation,other_shape,other_colour\n"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,star,red,up,black,orbits,heart,blue", "and not both"),
        ("a,star,red,,black,,,", "must have a motion"),
        ("a,star,red,,black,eats,heart,blue", "relation = eats: must be one of orbits"),
        ("a,star,red,,black,orbits,heart,", "must have a motion"),
        ("a,star,red,,black,orbits,heart,red", "'a' is what no clip shows: other_colour = red: must be"),
        ("a,circle,red,turn,black,,,", "'a' is what no clip shows: a circle does not show"),
    ],
)
def test_prompts_that_no_clip_can_show_are_refused(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text(f"{HEADER}{text}\n")
    with pytest.raises(UserError, match=part):
        read_expected([tmp_path / "odd.csv"])


def test_prompt_files_of_two_worlds_or_of_one_name_are_refused(tmp_path: Path) -> None:
    small, large = tmp_path / "prompts_heldout.csv", tmp_path / "prompts_seen.csv"
    small.write_text("prompt,shape,colour,motion,background\na,circle,red,up,black\n")
    large.write_text(f"{HEADER}a,star,red,up,black,,,\n")
    shutil.copyfile(small, tmp_path / "heldout.csv")
    with pytest.raises(UserError, match="are two sets of one name: give only one of them"):
        read_expected([small, tmp_path / "heldout.csv"])
    with pytest.raises(UserError, match="are two sets of one name: give only one of them"):
        read_expected([tmp_path / "prompts_.csv"] * 2)
    with pytest.raises(UserError, match="is of world 32 and .* of world 64: score them one by one"):
        read_expected([small, large])
