"""The settings of one video are read alike from a prompts file (.jsonl, .csv), and from JSON or a form over HTTP."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.pipelines.prompts import read_prompts
from stdit.serve.queue.submissions import FIELDS

WHOLE, NUMBER, NUMBERS = "must be a whole number", "must be a number", "must be a list of numbers"
COUNT = f"{WHOLE} from 1 to 16384"
PAB = {"pab": [2, 4, 6]}
REFINED = {"refine_pairs": 1}
ROWS: list[tuple[str, Any, list[tuple[Any, str]], dict[str, Any]]] = [
    ("prompt", "a star", [("", "empty"), ("  ", "empty")], {}),
    ("negative_prompt", "a square", [], {}),
    ("seed", 5, [("x", WHOLE), (True, WHOLE), (1.5, WHOLE), (-1, "from 0 to"), (2**63, "from 0 to")], {}),
    ("num_frames", 25, [("x", WHOLE), ("25", WHOLE), (True, WHOLE), (0, COUNT)], {}),
    ("height", 64, [("x", WHOLE), (0, COUNT)], {"width": 64}),
    ("width", 64, [("x", WHOLE), (0, COUNT)], {"height": 64}),
    ("fps", 12, [("fast", NUMBER), ([3], NUMBER), (0, "must be from 0.01 to 1000")], {}),
    ("num_inference_steps", 4, [("x", WHOLE), (2.5, WHOLE), (0, COUNT)], {}),
    ("solver", "heun", [("ddim", "must be one of euler, heun")], {}),
    ("cache", "slow", [("often", "must be off, slow, fast"), (-0.1, "must be off, slow, fast")], {}),
    ("pab", [2, 4, 6], [(2, NUMBERS), ([2, "4", 6], NUMBERS), ([2], "for how many steps")], {}),
    ("pab_timesteps", [100, 900], [(5, NUMBERS), (["a", "b"], NUMBERS), ([900, 100], "two rising")], PAB),
    ("guidance_scale", 2.0, [("x", NUMBER), (True, NUMBER), (-1, "must be at least 0")], {}),
    ("guidance_schedule", "linear", [("cosine", "must be one of constant, linear")], {}),
    (
        "guidance_interval",
        [0.2, 0.4],
        [(0.2, NUMBERS), ([0.2, "1"], NUMBERS), ([0.2], "two rising")],
        {"guidance_schedule": "interval"},
    ),
    ("guidance_rescale", 0.5, [("x", NUMBER), (2, "must be from 0 to 1")], {}),
    ("shift", 3.0, [("x", NUMBER), (0, "must be above 0")], {}),
    ("refine_pairs", 1, [("x", WHOLE), (1.5, WHOLE), (-1, f"{WHOLE} from 0")], {}),
    ("refine_level", 0.5, [("x", NUMBER), (2, "must be between 0")], REFINED),
    ("refine_guidance_scale", 2.0, [("x", NUMBER), (-1, "must be at least 0")], REFINED),
    ("segments", 2, [("x", WHOLE)], {}),
    ("overlap", 4, [("x", WHOLE)], {"segments": 2}),
    ("segment_prompts", ["b", "c"], [([5], "text")], {}),
    ("loop", True, [(1, "must be true or false"), ("yes", "must be true or false")], {"segments": 2}),
]
"""Field, a value that is right, wrong ones with words of their error, and the fields beside it."""
OF_THE_SERVER = {"model", "loras", "conditions", "any_size", "size", "seconds"}
"""Fields that only requests have."""


def as_texts(fields: dict[str, Any]) -> dict[str, str]:
    """Write the values of fields as a form and a .csv file have them."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


class Entrance:
    """A way in which the fields of a video are read: JSON, form, .jsonl or .csv."""

    def __init__(self, kind: str, client: TestClient, folder: Path) -> None:
        self.kind, self.client, self.folder = kind, client, folder

    def read(self, fields: dict[str, Any], name: str) -> Any:
        """Return what is read for a field. Raises UserError that names the field and, in a file, the line."""
        if self.kind in ("JSON", "form"):
            sent = {"json": fields} if self.kind == "JSON" else {"data": as_texts(fields)}
            answer = self.client.post("/v1/videos", **sent).json()
            if answer["error"] is None:
                return answer["settings"][name]
            assert answer["error"]["param"] == name
            raise UserError(answer["error"]["message"])
        content, line = io.StringIO(), 1 if self.kind == ".jsonl" else 2
        if self.kind == ".jsonl":
            json.dump(fields, content)
        else:
            csv.writer(content).writerows([fields, as_texts(fields).values()])
        file = self.folder / f"prompts{self.kind}"
        file.write_text(content.getvalue())
        try:
            return getattr(read_prompts(file)[0], name)
        except UserError as error:
            assert f", line {line}: " in str(error)
            raise


@pytest.mark.parametrize("kind", [".jsonl", ".csv", "JSON", "form"])
def test_fields_are_read_alike_everywhere(kind: str, client: TestClient, tmp_path: Path) -> None:
    entrance = Entrance(kind, client, tmp_path)
    for name, good, wrong, beside in ROWS:
        fields = {"prompt": "a star", **beside}
        assert entrance.read({**fields, name: good}, name) == good
        for value, words in wrong:
            if kind in (".csv", "form") and as_texts({name: value}) == as_texts({name: good}):
                continue  # a number in quotes
            with pytest.raises(UserError) as refused:
                entrance.read({**fields, name: value}, name)
            assert name in str(refused.value) and words in str(refused.value), (name, value)


def test_the_table_has_all_fields() -> None:
    assert {name for name, *_ in ROWS} == set(FIELDS) - OF_THE_SERVER
