import json
from pathlib import Path

import pytest

from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.prompts import PromptLine, read_prompts
from stdit.pipelines.requests import plan_requests


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_txt(tmp_path):
    file = written(tmp_path, "p.txt", "# shapes\n\na red ball\n  ein grüner Stern, groß 圆 \n")
    assert [line.prompt for line in read_prompts(file)] == ["a red ball", "ein grüner Stern, groß 圆"]


def test_csv_sets_settings_and_keeps_other_columns(tmp_path):
    file = written(
        tmp_path,
        "p.csv",
        "\ufeffprompt,seed,guidance_scale,num_frames,shape,colour,motion,image\n"
        '"a star, blue",3,1.5,,star,blue,up,first.png\n'
        "a ball,,,8,ball,red,,\n",
    )
    first, second = read_prompts(file)
    assert (first.prompt, first.seed, first.guidance_scale, first.num_frames) == (
        "a star, blue",
        3,
        1.5,
        None,
    )
    assert first.extra == {"shape": "star", "colour": "blue", "motion": "up"}
    assert first.image == str(tmp_path / "first.png")
    assert (second.seed, second.num_frames, second.image) == (None, 8, None)


def test_jsonl(tmp_path):
    content = '{"prompt": "a", "fps": 8, "height": 16, "width": 32, "seed": null}\n\n{"prompt": "b\u2028c"}\n'
    first, second = read_prompts(written(tmp_path, "p.jsonl", content))
    assert first == PromptLine(prompt="a", fps=8, height=16, width=32)
    assert second.prompt == "b\u2028c"


def test_paths_of_conditioning_frames_are_relative_to_the_file(tmp_path):
    content = (
        '{"prompt": "a", "condition": ["b.png@0", "c/c.mp4@-8:8"], "reference_path": "d.png; e.png"}\n'
        '{"prompt": "b", "segment_prompts": ["c", "d"], "segments": 4, "overlap": 2, "loop": true}\n'
    )
    first, second = read_prompts(written(tmp_path, "p.jsonl", content))
    assert first.condition == [f"{tmp_path}/b.png@0", f"{tmp_path}/c/c.mp4@-8:8"]
    assert first.reference_path == f"{tmp_path}/d.png;{tmp_path}/e.png"
    assert (second.segment_prompts, second.segments, second.overlap, second.loop) == (["c", "d"], 4, 2, True)
    (line,) = read_prompts(written(tmp_path, "p.csv", "prompt,condition\na,b.png@0\n"))
    assert line.condition == first.condition[:1]
    nothing = '{"prompt": "a", "image": "", "reference_path": ""}'
    assert read_prompts(written(tmp_path, "p.jsonl", nothing))[0].image == ""
    assert plan_requests(SampleConfig(prompts=str(tmp_path / "p.jsonl")))[0].image is None


def test_csv_lists_and_booleans(tmp_path):
    content = (
        "prompt,segment_prompts,loop,guidance_interval,condition\n"
        'a,"[""b"", ""c""]",true,"[0.2, 0.8]",[d].png@0\nb,c,false,,\n'
    )
    first, second = read_prompts(written(tmp_path, "p.csv", content))
    assert (first.segment_prompts, first.loop, first.guidance_interval) == (["b", "c"], True, [0.2, 0.8])
    assert first.condition == [f"{tmp_path}/[d].png@0"]
    assert (second.segment_prompts, second.loop, second.guidance_interval) == (["c"], False, None)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "# only a remark\n\n", "holds no prompt"),
        ("p.csv", "", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.csv", "text,seed\na,1\n", "line 1: no column 'prompt'"),
        ("p.csv", "prompt,guidance_scal\na,1\n", "line 1: .*did you mean 'guidance_scale'"),
        ("p.csv", "prompt,seed\na,1\nb,x\n", "line 3: seed = 'x': must be a whole number"),
        ("p.csv", "prompt,seed\na,1,2\n", "line 2: must have 2 fields"),
        ("p.csv", "prompt,seed\na\n", "line 2: must have 2 fields"),
        ("p.csv", 'prompt,seed\n"a,1\n', "line 2: not valid csv"),
        ("p.csv", "prompt,seed\n ,1\n", "line 2: the prompt is empty"),
        ("p.csv", "prompt,height\na,8\n", "line 2: width is missing"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", '["a"]\n', "line 1: must be an object"),
        (
            "p.jsonl",
            '{"prompt": "a", "num_frame": 3}\n',
            "line 1: unknown key 'num_frame': did you mean 'num_frames'",
        ),
        ("p.jsonl", '{"seed": 3}\n', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "guidance_scale": NaN}\n', "line 1: guidance_scale = nan"),
        ("p.jsonl", '{"prompt": "a", "condition": [3]}\n', r"line 1: condition = \[3\]"),
        (
            "p.csv",
            "prompt,segment_prompts\na,[b]\n",
            r"line 2: segment_prompts = '\[b\]': must be a list such as",
        ),
        ("p.pdf", "a", "must end in .txt, .csv, .jsonl"),
    ],
)
def test_errors_name_the_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, name, content))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "link", "link/a.png"])
@pytest.mark.parametrize("key", ["image", "reference_path", "condition"])
def test_paths_outside_the_folder_of_the_prompts_are_refused(tmp_path: Path, key: str, path: str) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    value: object = [f"{path}@0"] if key == "condition" else path
    file = written(folder, "p.jsonl", json.dumps({"prompt": "a", key: value}))
    with pytest.raises(UserError, match="prompt 1: .* lies outside of .*, the folder of the prompts file"):
        read_prompts(file)
