"""Arguments that pipelines of diffusers have: states instead of prompts, noise, several videos, callbacks."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from torch import Tensor

from stdit.errors import UserError
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.text_rows import repeated_states
from tests.pipelines.tiny import tiny_pipeline

PROMPTS = ["a red circle", "a blue square moves"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe: STDiTPipeline, prompt: Any = None, seeds: tuple[int, ...] = (1,), **more: Any) -> Tensor:
    found: Tensor = pipe(prompt, generator=generators(*seeds), output_type="latent", **more).frames
    return found


def states_of(pipe: STDiTPipeline, *arguments: Any, **more: Any) -> dict[str, Any]:
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    return dict(zip(names, pipe.encode_prompt(*arguments, **more), strict=True))


@pytest.mark.parametrize("negative", [None, "blur", [None, "blur"]])
def test_states_instead_of_prompts(negative: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    expected = sample(pipe, PROMPTS, (1, 2), negative_prompt=negative)
    states = states_of(pipe, PROMPTS, negative)
    assert (states["negative_prompt_embeds"] is None) == (negative is None)
    mixed = states | (dict(negative_prompt_embeds=None, negative_prompt_attention_mask=None))
    if negative is None:
        pipe.text_encoder = pipe.tokenizer = None
        assert torch.equal(sample(pipe, seeds=(1, 2), **states), expected)
    elif isinstance(negative, str):
        torch.testing.assert_close(sample(pipe, seeds=(1, 2), **states), expected, atol=1e-5, rtol=1e-5)
        text = dict(negative_prompt=negative)
        torch.testing.assert_close(
            sample(pipe, seeds=(1, 2), **mixed, **text), expected, atol=1e-5, rtol=1e-5
        )
    else:  # the null caption of the first is no text: it needs the negative prompts
        found = sample(pipe, seeds=(1, 2), **mixed, negative_prompt=negative)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_without_a_text_encoder(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(UserError, match="no text_encoder: pass prompt_embeds instead of a prompt"):
        sample(pipe, "a red circle")


def test_a_text_encoder_that_is_taken_out_is_let_go(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    encoder = weakref.ref(pipe.text_encoder)
    sample(pipe, "a red circle")
    pipe.text_encoder = pipe.tokenizer = None
    gc.collect()
    assert encoder() is None


@pytest.mark.parametrize("both", [False, True])
def test_one_of_prompt_and_states_is_needed(pipe: STDiTPipeline, both: bool) -> None:
    states = states_of(pipe, "a") if both else {}
    with pytest.raises(UserError, match="pass one of them"):
        sample(pipe, "a" if both else None, **states)


def test_noise_of_the_caller(pipe: STDiTPipeline) -> None:
    noise = torch.randn(1, 3, 4, 8, 8, generator=generators(1)[0])
    assert torch.equal(sample(pipe, "a", latents=noise), sample(pipe, "a"))
    with pytest.raises(UserError, match=r"latents \[1, 3, 2, 8, 8\]: must be \[1, 3, 4, 8, 8\]"):
        sample(pipe, "a", latents=noise[:, :, :2])


def test_several_videos_of_each_prompt(pipe: STDiTPipeline) -> None:
    picture = torch.rand(3, 8, 8, generator=generators(0)[0])
    more: dict[str, Any] = dict(image=[picture, None], negative_prompt=["blur", None])
    found = sample(pipe, PROMPTS, (1, 2, 3, 4), num_videos_per_prompt=2, **more)
    for index, (prompt, image, negative) in enumerate(
        [(PROMPTS[0], picture, "blur")] * 2 + [(PROMPTS[1], None, None)] * 2
    ):
        alone = sample(pipe, prompt, (index + 1,), image=image, negative_prompt=negative)
        torch.testing.assert_close(found[index], alone[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="2 values of generator for 4 prompts"):
        sample(pipe, PROMPTS, (1, 2), num_videos_per_prompt=2)
    for number in (0, 1.5, "2"):
        with pytest.raises(
            UserError, match=f"num_videos_per_prompt = {number!r}: must be a whole number, at least"
        ):
            sample(pipe, PROMPTS, (), num_videos_per_prompt=number)


def test_longest_prompt(pipe: STDiTPipeline) -> None:
    long = "a red circle moves up and a blue square moves down"
    found = states_of(pipe, long, max_sequence_length=4)["prompt_embeds"]
    assert found.shape[1] == 4 < states_of(pipe, long)["prompt_embeds"].shape[1]
    assert not torch.allclose(sample(pipe, long, max_sequence_length=4), sample(pipe, long), atol=1e-4)
    for length in (1, 129):
        with pytest.raises(
            UserError, match=f"max_sequence_length = {length}: must be 2 to 128, which the model"
        ):
            sample(pipe, long, max_sequence_length=length)


def test_a_callback_interrupts(pipe: STDiTPipeline) -> None:
    seen: list[Tensor] = []

    def stop(
        pipe: STDiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert pipe.num_timesteps == 3 and pipe.current_timestep == timestep and not pipe.interrupt
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    found = sample(pipe, "a", callback_on_step_end=stop, refine_pairs=2)
    assert len(seen) == 2 and torch.equal(found, seen[-1])
    assert pipe.interrupt and pipe.current_timestep is None
    assert sample(pipe, "a").isfinite().all() and not pipe.interrupt


def test_a_callback_interrupts_the_refinement(pipe: STDiTPipeline) -> None:
    seen: list[Tensor] = []

    def stop(pipe: STDiTPipeline, pair: int, clean_latents: Tensor) -> None:
        assert pair == len(seen)
        seen.append(clean_latents)
        pipe._interrupt = pair == 1

    found = sample(pipe, "a", callback_on_pair_end=stop, refine_pairs=4)
    assert len(seen) == 2 and torch.equal(found, seen[-1])
    assert torch.equal(found, sample(pipe, "a", refine_pairs=2))


def test_a_callback_changes_text_and_guidance(pipe: STDiTPipeline) -> None:
    """Guidance between equal texts is none, so that both changes give the same video (the masks are equal)."""
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    more: dict[str, Any] = dict(negative_prompt="a blue square", num_inference_steps=2)
    found = []
    for scale in (1.0, 5.0):

        def change(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            assert list(tensors) == names
            pipe._guidance_scale = scale  # noqa: B023
            return {"prompt_embeds": tensors["negative_prompt_embeds"]}

        callback = dict(callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
        found.append(sample(pipe, "a red circle", **callback, **more))
        assert pipe.guidance_scale == scale and pipe.do_classifier_free_guidance == (scale != 1)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], sample(pipe, "a red circle", **more), atol=1e-4)


STATES, MASK = torch.zeros(1, 5, 16), torch.ones(1, 5)
NAN = torch.full((1, 3, 4, 8, 8), float("nan"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt_embeds=STATES[0]), r"prompt_embeds \[5, 16\]: must be a tensor of .* with 3 dimensions"),
        (dict(prompt_embeds=[STATES]), "prompt_embeds list: must be a tensor of floating-point numbers"),
        (dict(prompt_embeds=STATES.long()), "must be a tensor of floating-point numbers"),
        (dict(prompt_embeds=STATES[:0]), r"prompt_embeds \[0, 5, 16\]: must be \[1, L, 16\]"),
        (
            dict(prompt_embeds=STATES[:, :, :8]),
            r"\[1, 5, 8\]: must be \[1, L, 16\] .prompts, at most 128 tokens",
        ),
        (dict(prompt_embeds=torch.zeros(1, 129, 16)), r"\[1, 129, 16\]: must be \[1, L, 16\]"),
        (dict(prompt_embeds=STATES / 0), "prompt_embeds .*: has values that are NaN or infinite"),
        (
            dict(prompt_embeds=STATES, prompt_attention_mask=MASK[:, :4]),
            r"mask \[1, 4\]: must be \[1, 5\], as",
        ),
        (dict(prompt="a", prompt_attention_mask=MASK), "prompt_attention_mask without prompt_embeds"),
        (
            dict(prompt="a", negative_prompt_attention_mask=MASK),
            "negative_prompt_attention_mask without negative",
        ),
        (dict(prompt=["a", "b"], negative_prompt_embeds=STATES), r"\[1, 5, 16\]: must be \[2, L, 16\]"),
        (
            dict(prompt="a", negative_prompt="b", negative_prompt_embeds=STATES),
            "negative_prompt = 'b', negative_prompt_embeds = a tensor: pass one of them",
        ),
        (
            dict(prompt_embeds=STATES, max_sequence_length=4),
            "max_sequence_length = 4 would have no effect: .* give it to encode_prompt",
        ),
        (dict(prompt="a", latents=NAN), "latents .*: has values that are NaN or infinite"),
        (dict(prompt="a", latents=NAN.numpy()), "latents ndarray: must be a tensor"),
    ],
)
def test_tensors_that_do_not_fit(
    pipe: STDiTPipeline, arguments: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STDiTPipeline, "encode_prompt", None)  # refused before anything is computed
    with pytest.raises(UserError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    "returned, more, message",
    [
        (
            {"latent": STATES},
            {},
            "'latent': may only name latents, prompt_embeds, negative_prompt_embeds",
        ),
        ([STATES], {}, "a list: must be a dictionary or None"),
        ({"latents": STATES}, {}, r"latents \[1, 5, 16\]: must be \[1, 3, 4, 8, 8\], as what it got"),
        ({"prompt_embeds": None}, {}, "prompt_embeds NoneType: must be"),
        ({"noise": None}, {}, "'noise': may only name latents"),
        ({"clean_latents": NAN}, {}, "another clean_latents, which is to be read only: return what it got"),
        (
            {"negative_prompt_embeds": STATES},
            dict(guidance_scale=1.0),
            ".*a call without guidance does not have",
        ),
    ],
)
def test_what_a_callback_may_not_return(pipe: STDiTPipeline, returned: Any, more: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"callback_on_step_end returned {message}"):
        pipe("a", callback_on_step_end=lambda *_: returned, **more)


def test_a_callback_returns_all_that_it_got(pipe: STDiTPipeline) -> None:
    def same(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors.keys() == set(STDiTPipeline._callback_tensor_inputs)
        return tensors

    names = STDiTPipeline._callback_tensor_inputs
    for scale in (1.0, 2.0):
        more: dict[str, Any] = dict(guidance_scale=scale)
        asked = dict(callback_on_step_end=same, callback_on_step_end_tensor_inputs=names)
        assert torch.equal(sample(pipe, "a", **asked, **more), sample(pipe, "a", **more))


class Doubles(PipelineCallback):
    """A callback of diffusers' class, which doubles the latents after the first step."""

    tensor_inputs = ["latents", "negative_prompt_embeds"]

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> Any:
        assert callback_kwargs["negative_prompt_embeds"] is not None
        if step_index == 0:
            callback_kwargs["latents"] = 2 * callback_kwargs["latents"]
        return callback_kwargs


def test_diffusers_own_callbacks(pipe: STDiTPipeline) -> None:
    def by_hand(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 4.0 if step < 1 else 1.0
        return {"latents": tensors["latents"] * (2 if step == 0 else 1)}

    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    found = sample(
        pipe, "a", guidance_scale=4.0, callback_on_step_end=MultiPipelineCallbacks([Doubles(), cut])
    )
    assert not pipe.do_classifier_free_guidance
    expected = sample(pipe, "a", guidance_scale=4.0, callback_on_step_end=by_hand)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, sample(pipe, "a", guidance_scale=4.0, callback_on_step_end=Doubles()))


def test_a_callback_cannot_replace_the_null_caption(pipe: STDiTPipeline) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    more: dict[str, Any] = dict(callback_on_step_end_tensor_inputs=names)

    def change(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] + 1}

    assert sample(pipe, "a", negative_prompt="b", callback_on_step_end=change, **more).isfinite().all()
    with pytest.raises(UserError, match="a negative prompt of this call is the null caption"):
        sample(pipe, "a", callback_on_step_end=change, **more)
    found = sample(pipe, "a", callback_on_step_end=lambda pipe, step, timestep, tensors: tensors, **more)
    assert torch.equal(found, sample(pipe, "a")), "what it got may be returned"


def test_guidance_cannot_begin_in_a_call(pipe: STDiTPipeline) -> None:
    def raised(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe._guidance_scale = 3.0

    with pytest.raises(
        UserError, match="set _guidance_scale from 1.0 to 3.0, but this call began without guidance"
    ):
        sample(pipe, "a", guidance_scale=1.0, callback_on_step_end=raised)
    assert sample(pipe, "a", guidance_scale=2.0, callback_on_step_end=raised).isfinite().all()


def test_a_mask_goes_to_the_device_of_its_states() -> None:
    states, mask = repeated_states(torch.empty(2, 3, 4, device="meta"), torch.ones(2, 3), 2)
    assert mask.device == states.device and mask.dtype == torch.bool


def test_a_call_that_fails_leaves_no_cache_behind(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)

    def fails(*args: Any) -> Any:
        raise KeyError("of the callback")

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(KeyError, match="of the callback"):
        sample(pipe, PROMPTS, (1, 2), callback_on_step_end=fails)
    assert pipe.current_timestep is None
    sample(pipe, "a")


@pytest.mark.parametrize("negative", [None, "blur"])
def test_faster_cache(negative: str | None, tmp_path: Path) -> None:
    """Every second call is of the conditional rows alone, also with the null caption."""
    pipe = tiny_pipeline(tmp_path)
    expected, rows = sample(pipe, "a red circle", negative_prompt=negative), []
    model = pipe.transformer
    model.x_embedder.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    model.enable_cache(
        FasterCacheConfig(
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(0, 1001),
            spatial_attention_block_identifiers=model.block_patterns("spatial"),
            temporal_attention_block_identifiers=model.block_patterns("temporal"),
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BCFHW",
        )
    )
    found = sample(pipe, "a red circle", negative_prompt=negative)
    assert rows == [2, 1, 2] and found.isfinite().all() and not torch.equal(found, expected)
