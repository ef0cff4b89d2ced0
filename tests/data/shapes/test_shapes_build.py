"""The files of the embedded data set."""

import hashlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from stdit.data.manifest.rows import near_misses
from stdit.data.shapes import build as build_module
from stdit.data.shapes.build import ShapesConfig, build, draw_clip, draw_prompts, write_video
from stdit.data.shapes.captions import SEEN
from stdit.data.shapes.checker import score
from stdit.data.shapes.render import render
from stdit.data.shapes.scenes import Scene
from stdit.data.shapes.worlds import WORLDS, split_combinations
from stdit.errors import UserError
from tests.data.shapes.clips import FEW, LARGE, SMALL, counts, read, run_script, scenes, unseen_names


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module", params=FEW)
def config(request: pytest.FixtureRequest) -> ShapesConfig:
    return FEW[request.param]


@pytest.fixture(scope="module")
def built(config: ShapesConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert build(folder, config, workers=1)
    return folder


def combo(row: dict[str, str]) -> tuple[str, ...]:
    if row.get("relation"):
        return tuple(row[name] for name in ("shape", "colour", "relation", "other_shape", "other_colour"))
    return row["shape"], row["colour"], row["motion"]


def test_build_writes_clips_that_show_their_captions(built: Path, config: ShapesConfig) -> None:
    rows = read(built / "manifest.csv")
    assert len(rows) == config.num_clips and {row["text"] for row in rows} == {
        text for i in range(config.num_clips) for text in draw_clip(i, config)[1]
    }
    assert near_misses(rows[0]) == []
    world = config.facts
    train = [combo for pairs in (False, True) for combo in split_combinations(config.seed, world, pairs)[0]]
    for row in rows:
        assert combo(row) in train
        with av.open(built / row["path"]) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", world.fps)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert frames.shape == (*(int(row[key]) for key in ("num_frames", "height", "width")), 3)
        assert frames.shape[:2] == (world.num_frames, world.size)
        assert score(frames, row, world)["strict"]
    assert not list(built.parent.glob("*.tmp"))
    assert {bool(row.get("relation")) for row in rows} == ({False, True} if world.relations else {False})


def test_world_32_is_what_it_was_before_there_were_others(tmp_path: Path) -> None:
    build(tmp_path / "shapes", replace(FEW["32"], num_clips=3, seed=0), workers=1)
    files = {
        name: digest for name, digest in digests(tmp_path / "shapes").items() if not name.endswith("mp4")
    }
    assert len(files) == 8
    joined = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    assert hashlib.sha256(joined.encode()).hexdigest()[:16] == "d4e7d2794afc0e5a"


def test_build_writes_prompts(built: Path, config: ShapesConfig) -> None:
    world = config.facts
    train, held_out = split_combinations(config.seed, world)
    trained = {row["text"] for row in read(built / "manifest.csv")}
    for name, combos in (
        ("heldout", held_out),
        ("paraphrase", held_out),
        ("paraphrase_strict", held_out),
        ("seen", train),
    ):
        rows = read(built / f"prompts_{name}.csv")
        assert len(rows) >= 96 and len({row["prompt"] for row in rows}) == len(rows)
        assert {combo(row) for row in rows} == set(combos)
        assert {row["background"] for row in rows} == set(world.backgrounds)
        assert not trained & {row["prompt"] for row in rows}
        for row in rows:
            scene = Scene(row["shape"], row["colour"], row["motion"], row["background"])
            unseen = len(unseen_names(row["prompt"], scene))
            least, most = {"paraphrase": (1, 3), "paraphrase_strict": (3, 3)}.get(name, (0, 0))
            assert least <= unseen <= most, row
    sample = (built / "prompts.txt").read_text().splitlines()
    rows = read(built / "prompts_sample.csv")
    assert sample == [row["prompt"] for row in rows] and len(sample) == 8
    assert {row["shape"] for row in rows} >= set(SMALL.shapes) and len({row["motion"] for row in rows}) >= 5


def test_build_writes_prompts_on_held_out_relations(built: Path, config: ShapesConfig) -> None:
    world = config.facts
    files = sorted(path.name for path in built.glob("prompts_relations*.csv"))
    if not world.relations:
        assert not files
        return
    assert files == ["prompts_relations.csv", "prompts_relations_paraphrase.csv"]
    held_out = split_combinations(config.seed, world, pairs=True)[1]
    trained = {row["text"] for row in read(built / "manifest.csv")}
    for file in files:
        rows = read(built / file)
        assert len(rows) == 216 == len({row["prompt"] for row in rows}) == len({combo(row) for row in rows})
        assert {combo(row) for row in rows} <= set(held_out) and not trained & {row["prompt"] for row in rows}
        assert {row["motion"] for row in rows} == {""}
        assert all(sum(row["relation"] == name for row in rows) == 54 for name in world.relations)
        for name in ("shape", "colour", "background"):
            assert {row[name] for row in rows} == set(getattr(world, name + "s"))


def test_prompts_avoid_given_texts() -> None:
    once = draw_prompts("heldout", [("circle", "red", "up")], 1, seed=0)
    again = draw_prompts("heldout", [("circle", "red", "up")], 1, 0, frozenset({once[0]["prompt"]}))
    assert once[0]["prompt"] != again[0]["prompt"] and once[0]["shape"] == again[0]["shape"]


@pytest.mark.parametrize("config", ["32", pytest.param("64", marks=pytest.mark.slow)], indirect=True)
def test_build_is_deterministic_in_any_number_of_processes(
    built: Path, config: ShapesConfig, tmp_path: Path
) -> None:
    assert build(tmp_path / "shapes", config, workers=2)
    assert digests(tmp_path / "shapes") == digests(built)
    assert build(tmp_path / "other", replace(config, seed=4, num_clips=1), workers=1)
    assert digests(tmp_path / "other")["videos/00000.mp4"] != digests(built)["videos/00000.mp4"]


@counts(6, 40)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    shown = [(scene, 16, 32) for scene in scenes(count * 3 // 4, seed=9)]
    shown += [(scene, 24, 64) for scene in scenes(count // 4, seed=9, world=LARGE, pairs=True)]
    for scene, frames, size in shown:
        files = set()
        for _ in range(3):
            _leave_garbage_in_memory(rng)
            write_video(tmp_path / "clip.mp4", render(scene, frames, size), fps=8, crf=12)
            files.add((tmp_path / "clip.mp4").read_bytes())
        assert len(files) == 1, scene


def _leave_garbage_in_memory(rng: np.random.Generator) -> None:
    """Fill memory that is then freed: an encoder that reads uninitialised memory shows it only if it is not zero."""
    garbage = [np.frombuffer(rng.bytes(int(n)), np.uint8).copy() for n in rng.integers(100, 200_000, 40)]
    del garbage


def test_build_reuses_and_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    config = ShapesConfig(num_clips=2)
    assert build(folder, config, workers=1)
    before = (folder / "manifest.csv").stat().st_mtime_ns
    assert not build(folder, config, workers=1)
    assert (folder / "manifest.csv").stat().st_mtime_ns == before
    (folder / "stdit-cache").mkdir()
    (folder / "stdit-cache" / "mine").write_text("hours of encoding")
    said = build(folder, replace(config, num_clips=3), workers=1)
    assert said == "written in place of those of num_clips 2; other files in the folder stay"
    assert len(read(folder / "manifest.csv")) == 3 and len(list((folder / "videos").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert (folder / "stdit-cache" / "mine").read_text() == "hours of encoding"
    build(folder, config, workers=1)
    assert len(list((folder / "videos").iterdir())) == 2


def test_another_world_replaces_all_files_of_a_build(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    large = ShapesConfig.of("64", num_clips=2)
    build(folder, large, workers=1)
    (folder / "prompts_mine.csv").write_text("prompt")
    assert (folder / "prompts_relations.csv").exists()
    assert "of num_frames 25, fps 12, size 64, world 64;" in build(
        folder, ShapesConfig(num_clips=2), workers=1
    )
    assert not (folder / "prompts_relations.csv").exists() and (folder / "prompts_mine.csv").exists()
    assert "world 32;" in build(folder, large, workers=1)
    assert (folder / "prompts_relations.csv").exists()


def test_a_replacement_that_is_interrupted_is_not_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "shapes", ShapesConfig(num_clips=2)
    build(folder, config, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(build_module.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, replace(config, num_clips=3), workers=1)
    assert "in place of those of an interrupted build;" in build(folder, config, workers=1)
    assert len(read(folder / "manifest.csv")) == 2 == len(list((folder / "videos").iterdir()))


def test_build_starts_over_when_words_or_lengths_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(FEW["64"], num_clips=1)
    assert build(tmp_path / "shapes", config, workers=1)
    monkeypatch.setitem(SEEN["colour"], "red", ("reddish",))
    assert build(tmp_path / "shapes", config, workers=1)
    monkeypatch.setitem(WORLDS, "64", replace(WORLDS["64"], travel=9.0))
    assert build(tmp_path / "shapes", config, workers=1)
    assert not build(tmp_path / "shapes", config, workers=1)


def test_interrupted_build_leaves_nothing_and_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shapes"
    (tmp_path / "shapes.tmp" / "videos").mkdir(parents=True)  # as after kill -9
    (tmp_path / "shapes.tmp" / "videos" / "left.mp4").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_write_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, FEW["32"], workers=1)
    assert not list(tmp_path.iterdir())
    assert build(folder, FEW["32"], workers=1) and not (folder / "videos" / "left.mp4").exists()


def test_build_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not written by this command"):
        build(tmp_path, FEW["32"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not written by this command"):
        build(tmp_path / "file", FEW["32"])
    with pytest.raises(UserError, match="cannot be written"):
        build(tmp_path / "file" / "shapes", FEW["32"])


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "num_clips": (0,),
        "size": (33, 16, 8192),
        "seed": (-1,),
        "fps": (0, 1001),
        "num_frames": (0, 10_001),
    }.items(),
)
def test_settings_out_of_range_are_errors(name: str, values: tuple[int, ...], tmp_path: Path) -> None:
    for world in FEW:
        for value in values:
            with pytest.raises(UserError, match=f"{name} = {value}: must be"):
                ShapesConfig.of(world, **{name: value})
    with pytest.raises(UserError, match="workers = 0: must be at least 1"):
        build(tmp_path, workers=0)


def test_a_world_has_its_own_size_and_least_size() -> None:
    config = ShapesConfig.of("64", num_clips=5)
    assert (config.size, config.num_frames, config.fps, config.num_clips) == (64, 25, 12, 5)
    assert ShapesConfig.of("64").num_clips == 40_000
    assert ShapesConfig.of("32") == ShapesConfig()
    with pytest.raises(UserError, match="from 64 pixels"):
        ShapesConfig.of("64", size=32)
    with pytest.raises(UserError, match="world = 16: must be one of 32, 64"):
        ShapesConfig.of("16")


def test_make_shapes_builds_either_world(tmp_path: Path) -> None:
    command = ["make_shapes", "--output", tmp_path / "a", "--num_clips", "2", "--workers", "1"]
    done = run_script(*command, "--world", "64")
    assert done.returncode == 0, done.stderr
    assert [row["height"] for row in read(tmp_path / "a" / "manifest.csv")] == ["64", "64"]
    assert "2 clips exist already" in run_script(*command, "--world", "64").stdout
    assert "2 clips written" in run_script(*command).stdout  # another world: built again
    assert "relation" not in read(tmp_path / "a" / "manifest.csv")[0]
    assert run_script(*command, "--world", "16").returncode == 2
