"""The training loop in the page of adapters, run as it stands."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdit.data.batch import EncodedBatch
from stdit.parallel.sequence.group import ONE_RANK
from stdit.pipelines import STDiTPipeline
from stdit.pipelines.video_io import write_gif
from stdit.training.flow_matching import FlowMatching

PAGE = Path(__file__).parents[2] / "stdit/lora/README.md"


def own_losses(pipe: STDiTPipeline, loop: dict[str, Any], steps: range) -> list[float]:
    """The losses of the project's own training of the loop's clip, for its draws."""
    values = dict.fromkeys(field.name for field in fields(EncodedBatch))
    values |= {
        "latents": loop["latents"],
        "text_states": loop["states"],
        "text_mask": loop["mask"],
        **loop["size"],
    }
    batch: Any = EncodedBatch(**values)
    method, shape = FlowMatching(pipe.flow), loop["latents"].shape[1:]
    sharding = pipe.transformer.token_sharding(ONE_RANK, *shape[1:])
    losses = []
    with torch.no_grad():
        for step in steps:
            draws = method.draw(0, step, [0], tuple(shape), 64, 64)
            losses.append(method.losses(pipe.transformer, batch, draws, sharding).item())
    return losses


def test_the_loop_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loss is that of the project's own training; an adapter it saves lowers that for other draws."""
    frames = np.zeros((25, 64, 64, 3), np.uint8)
    for frame in range(25):
        frames[frame, 20:40, frame : frame + 20] = (250, 200, 0)
    write_gif(tmp_path / "clip.gif", frames, 12)
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").partition("## A training loop of your own")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)
    assert code is not None
    loop: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code[1], loop)

    pipe = STDiTPipeline.from_pretrained()
    assert loop["losses"][0] == pytest.approx(own_losses(pipe, loop, range(1))[0], rel=1e-5)
    others = range(1000, 1010)
    before = own_losses(pipe, loop, others)
    pipe.load_lora_weights("my_lora")
    after = own_losses(pipe, loop, others)
    assert sum(after) < 0.8 * sum(before), (before, after)
    assert sum(after) == pytest.approx(sum(own_losses(loop["pipe"], loop, others)), rel=1e-4)
