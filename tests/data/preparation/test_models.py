"""`caption` and `score --scores text` with tiny models that are made here, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.prepare_data import main
from stdit.data.decoding.media import Media
from stdit.data.preparation import captioning
from stdit.data.preparation.captioning import Captioner, spread_frames
from stdit.data.preparation.flow import ClipRecord
from stdit.data.preparation.scoring import ScoringWindow, middle_frames
from stdit.errors import UserError
from tests.data.preparation import tiny_models
from tests.data.preparation.conftest import pattern, read_csv

FEW = ["--workers", "0", "--max_new_tokens", "4", "--frames", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of each model."""
    base = tmp_path_factory.mktemp("models")
    saved = {name: getattr(tiny_models, f"save_{name}")(base / name) for name in ("blip", "llava", "clip")}
    return {name: str(folder) for name, folder in saved.items()}


@pytest.fixture
def source(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """Five clips, of which one has a caption."""
    for k in range(5):
        write_video(tmp_path / f"{k}.mp4", frames=pattern(k, 8))
    path = tmp_path / "source.csv"
    path.write_text(
        "path,text,mood\n0.mp4,a red ball,calm\n" + "".join(f"{k}.mp4,,left\n" for k in range(1, 5))
    )
    return path


def captions(path: Path) -> list[str]:
    return [row["text"] for row in read_csv(path)]


@pytest.mark.parametrize("model", ["blip", "llava"])
def test_clips_without_a_caption_get_one(
    source: Path, folders: dict[str, str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = source.parent / "captioned.csv"
    command = ["caption", str(source), str(output), "--model", folders[model], *FEW, "--batch_size"]
    main([*command, "3", "--template", "describe {mood}"])
    assert "4 captions written" in capsys.readouterr().out
    made = captions(output)
    assert made[0] == "a red ball" and all(made[1:]) and len(set(made[1:])) > 1, "the frames decide"
    main([*command, "1", "--template", "describe {mood}", "--overwrite", "--workers", "1"])
    assert captions(output) == made, "batches and processes change nothing"
    main([*command, "2", "--template", "what happens {mood}", "--overwrite", "--replace"])
    assert captions(output) != made and captions(output)[0] != "a red ball"


def test_a_caption_is_what_the_model_writes_for_its_middle_frame(
    source: Path, folders: dict[str, str]
) -> None:
    from transformers import AutoProcessor, BlipForConditionalGeneration

    output = source.parent / "captioned.csv"
    main(["caption", str(source), str(output), "--model", folders["blip"], *FEW])
    model = BlipForConditionalGeneration.from_pretrained(folders["blip"])
    processor = AutoProcessor.from_pretrained(folders["blip"])
    frames = spread_frames(ClipRecord(Media.of(source.parent / "3.mp4")), 2, 448)
    inputs = processor(images=Image.fromarray(frames[1]), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert captions(output)[3] == processor.decode(tokens[0], skip_special_tokens=True)


def test_captioning_resumes_and_a_clip_that_fails_is_lost_alone(
    source: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    broken, stop = 3, 3
    write = Captioner.write

    def watched(self: Captioner, clips: list[np.ndarray], prompts: list[str]) -> list[str]:
        levels = [int(clip.mean()) for clip in clips]
        seen.extend(levels)
        if len(seen) >= stop:
            raise KeyboardInterrupt
        if broken in levels:
            raise ValueError("no such colour")
        return write(self, clips, prompts)

    monkeypatch.setattr(Captioner, "write", watched)
    monkeypatch.setattr(captioning, "spread_frames", _numbered)
    output = source.parent / "captioned.csv"
    command = ["caption", str(source), str(output), "--model", folders["blip"], *FEW, "--batch_size", "2"]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert seen == [1, 2, 3, 4] and not output.exists()
    seen.clear()
    stop = 99
    main(command)
    assert seen == [3, 4, 3, 4], "1 and 2 are not written again; 3 and 4 together, then alone"
    assert [row["path"] for row in read_csv(output)] == ["0.mp4", "1.mp4", "2.mp4", "4.mp4"]
    (lost,) = read_csv(source.parent / "captioned.excluded.csv")
    assert lost["path"] == "3.mp4" and lost["reason"] == "captioning failed: ValueError: no such colour"
    assert not (source.parent / "captioned.csv.partial").exists()


def _numbered(record: ClipRecord, count: int, side: int) -> np.ndarray:
    """Frames whose grey level is the number of the clip."""
    return np.full((1, 32, 32, 3), int(Path(record.media.location).stem), np.uint8)


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "nowhere"], "no such local folder"),
    (["--model", "{clip}"], "a model of type clip writes no captions: name one"),
    (["--model", "{blip}", "--template", "a {mod}"], "no column 'mod' for {mod}: did you mean {mood}"),
    (["--model", "{blip}", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
    (["--model", "{blip}", "--dtype", "fp8"], "--dtype fp8: must be one of auto, fp32"),
    (["--model", "{blip}", "--device", "tpu7"], "device = tpu7: not available"),
    (["--model", "{blip}", "--frames", "0"], "--frames 0: must be from 1"),
])  # fmt: skip
def test_bad_flags_of_a_model_are_errors(
    source: Path, folders: dict[str, str], flags: list[str], message: str
) -> None:
    named = [folders.get(flag.strip("{}"), flag) for flag in flags]
    with pytest.raises(UserError, match=message.replace("{", "[{]")):
        main(["caption", str(source), str(source.parent / "out.csv"), *named])
    assert sorted(path.suffix for path in source.parent.iterdir()) == [".csv", *[".mp4"] * 5]


def test_the_score_text_is_the_cosine_of_caption_and_frames(source: Path, folders: dict[str, str]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    output = source.parent / "scored.csv"
    source.write_text("path,text\n0.mp4,a red ball\n1.mp4,\n2.mp4,a large blue cat\n")
    command = [
        "score",
        str(source),
        str(output),
        "--workers",
        "0",
        "--side",
        "32",
        "--scores",
        "text",
        "brightness",
    ]
    main([*command, "--model", folders["clip"], "--frames", "1", "--batch_size", "2"])
    rows = read_csv(output)
    assert [row["path"] for row in rows] == ["0.mp4", "1.mp4", "2.mp4"]
    assert rows[1]["clip_score"] == "" and all(float(row["brightness"]) > 0 for row in rows)

    model = CLIPModel.from_pretrained(folders["clip"])
    processor = CLIPProcessor.from_pretrained(folders["clip"])
    for row in (rows[0], rows[2]):
        record = ClipRecord(Media.of(source.parent / row["path"]))
        frame = middle_frames(record, ScoringWindow(frames=1, side=32))[0]
        inputs = processor(
            text=[row["text"]], images=[Image.fromarray(frame)], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            result: Any = model(**inputs)
        cosine = float((result.image_embeds @ result.text_embeds.T)[0, 0])
        assert float(row["clip_score"]) == pytest.approx(100 * cosine, abs=1e-2)


def test_bad_flags_of_the_score_text_are_errors(source: Path, folders: dict[str, str]) -> None:
    for flags, message in (
        (["--scores", "text"], "--scores text needs --model"),
        (["--scores", "brightness", "--model", folders["clip"]], "used by the score text alone"),
        (["--scores", "brightness", "--dtype", "fp32"], "--dtype is of the model of --scores text"),
        (["--scores", "text", "--model", folders["llava"]], "type llava does not compare"),
    ):
        with pytest.raises(UserError, match=message):
            main(["score", str(source), str(source.parent / "out.csv"), "--workers", "0", *flags])
