import inspect
import json
from dataclasses import fields

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, WanPipeline

from stdit.codecs import CodecConfig, build_codec
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import shift_t
from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.config import VideoSettings
from stdit.pipelines.guided_model import GuidedModel
from stdit.pipelines.images import image_to_frame
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_vae
from tests.pipelines.tiny import assert_same, tiny_model, tiny_pipeline

PROMPTS = ["a red circle moves up", "a blue star on white"]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents(pipe, prompt=PROMPTS[0], seeds=(1,), **settings):
    return pipe(prompt, generator=seeded(*seeds), output_type="latent", **settings).frames


def fitted_pca():
    codec = build_codec(CodecConfig(name="pca", stride=(2, 4, 4), channels=8))
    generator = torch.Generator().manual_seed(0)
    codec.fit(torch.rand(3, 4, 8, 8, generator=generator) * 2 - 1 for _ in range(8))
    return codec


@pytest.fixture(scope="module", params=["pixel", "pca", "AutoencoderKLWan"])
def any_pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    flow = None
    if request.param == "pixel":
        codec = build_codec(CodecConfig())
    elif request.param == "pca":
        codec = fitted_pca()
        flow = FlowConfig(prediction="residual")
    else:
        codec = build_codec(
            CodecConfig(name=request.param, path=str(save_tiny_vae(request.param, folder / "vae")))
        )
    return tiny_pipeline(folder, codec, flow)


def test_a_prompt_alone_is_enough(pipe):
    frames = pipe("a red circle").frames
    assert len(frames) == 1 and len(frames[0]) == 4
    assert frames[0][0].size == (8, 8)


def test_same_seed_same_pixels(pipe):
    first, again = (pipe(PROMPTS, generator=seeded(1, 2), output_type="np").frames for _ in range(2))
    other = pipe(PROMPTS, generator=seeded(3, 4), output_type="np").frames
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    "settings", [dict(), dict(negative_prompt=["a square", None]), dict(guidance_scale=1.0)]
)
def test_a_video_does_not_depend_on_its_batch(any_pipe, settings):
    together = latents(any_pipe, PROMPTS, (1, 2), **settings)
    negatives = settings.pop("negative_prompt", [None, None])
    for index, prompt in enumerate(PROMPTS):
        alone = latents(any_pipe, prompt, (index + 1,), negative_prompt=negatives[index], **settings)
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-5)


def test_one_generator_for_a_batch(pipe):
    (generator,) = seeded(1)
    frames = pipe(PROMPTS, generator=generator, output_type="latent").frames
    torch.testing.assert_close(frames[0], latents(pipe)[0], atol=1e-5, rtol=1e-5)


def test_the_first_frame_is_kept(any_pipe):
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    result = latents(any_pipe, image=picture, num_frames=8)
    repeats = 1 if any_pipe.codec.causal_first_frame else any_pipe.codec.stride[0]
    given = any_pipe.codec.encode(picture[None, :, None].repeat(1, 1, repeats, 1, 1))[0, :, :1]
    assert torch.equal(result[0, :, :1], given)
    free = latents(any_pipe, num_frames=8)
    assert not torch.allclose(result[0, :, 1:], free[0, :, 1:], atol=1e-4)  # the others see it


def test_samples_with_and_without_image_share_a_batch(pipe):
    picture = torch.zeros(3, 8, 8)
    together = latents(pipe, PROMPTS, (1, 2), image=[picture, None])
    torch.testing.assert_close(together[0], latents(pipe, seeds=(1,), image=picture)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], latents(pipe, PROMPTS[1], (2,))[0], atol=1e-5, rtol=1e-5)


def test_temporal_patches_cannot_be_conditioned(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    pipe.transformer = tiny_model(patch_size=(2, 4, 4))
    assert latents(pipe, refine_pairs=1).shape == (1, 3, 4, 8, 8)
    with pytest.raises(UserError, match="joins frames"):
        latents(pipe, image=torch.zeros(3, 8, 8))


def test_without_guidance_a_negative_prompt_changes_nothing(pipe):
    """It is no error, as in other pipelines of diffusers; on the command line it is one."""
    assert torch.equal(
        latents(pipe, guidance_scale=1.0, negative_prompt="blur"), latents(pipe, guidance_scale=1.0)
    )


def test_guidance_1_is_no_guidance(pipe, monkeypatch):
    batches = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda **inputs: batches.append(len(inputs["timestep"])) or forward(**inputs),
    )
    unguided = latents(pipe, guidance_scale=1.0)
    nearly = latents(pipe, guidance_scale=1.0 + 1e-6)
    assert batches == [1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(unguided, nearly, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unguided, latents(pipe, guidance_scale=3.0), atol=1e-3)


def test_refinement_repeats_the_mean_of_estimates_from_opposite_noise(pipe):
    """Against the estimates written out for one prompt."""
    generator = seeded(1)[0]
    torch.randn(1, 3, 4, 8, 8, generator=generator)  # what sampling starts from
    noises = [torch.randn(1, 3, 4, 8, 8, generator=generator) for _ in range(2)]
    sampled = latents(pipe, guidance_scale=1.0)
    states, mask = pipe.prompt_encoder.encode([PROMPTS[0]])
    size = [torch.tensor([8.0])] * 3
    t = torch.full((1, 1), 0.3)
    expected = sampled
    for noise in noises:
        estimates = []
        for signed in (noise, -noise):
            x_t = torch.lerp(expected, signed, 0.3)
            with torch.no_grad():
                output = pipe.transformer(x_t, 1000 * t, states, mask, *size).sample
            estimates.append(x_t + 0.3 * pipe.flow.velocity(output, x_t, t))
        expected = torch.stack(estimates).mean(0)
    unguided = dict(guidance_scale=1.0, refine_guidance_scale=1.0)
    refined = latents(pipe, refine_pairs=2, refine_level=0.3, **unguided)
    torch.testing.assert_close(refined, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(refined, sampled, atol=1e-2)


def test_refinement_keeps_conditioning_frames_and_does_not_depend_on_the_batch(any_pipe):
    picture = torch.full((3, 8, 8), 0.25)
    settings = dict(num_frames=8, refine_pairs=1, refine_guidance_scale=2.0)
    together = latents(any_pipe, PROMPTS, (1, 2), image=[picture, None], **settings)
    plain = latents(any_pipe, PROMPTS, (1, 2), image=[picture, None], num_frames=8)
    assert torch.equal(together[0, :, :1], plain[0, :, :1])
    assert not torch.allclose(together[0, :, 1:], plain[0, :, 1:], atol=1e-3)
    alone = latents(any_pipe, seeds=(1,), image=picture, **settings)
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)


def test_refinement_changes_partly_kept_frames_from_their_own_noise_level(pipe, monkeypatch):
    condition = FrameCondition(torch.zeros(3, 1, 8, 8), 0, strength=0.8)
    levels = []
    predict = GuidedModel.predict
    monkeypatch.setattr(
        GuidedModel, "predict", lambda self, x, t, *rest: levels.append(t) or predict(self, x, t, *rest)
    )
    unguided = dict(guidance_scale=1.0, refine_guidance_scale=1.0)
    refinement = dict(refine_pairs=1, refine_level=0.4)
    latents(pipe, conditions=[condition], num_inference_steps=8, **refinement, **unguided)
    torch.testing.assert_close(levels[-1], torch.tensor([[0.2, 0.4, 0.4, 0.4]]))


def test_guidance_0_is_the_negative_prompt(pipe):
    away = latents(pipe, guidance_scale=0.0, negative_prompt=PROMPTS[1])
    torch.testing.assert_close(away, latents(pipe, PROMPTS[1], guidance_scale=1.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, halves",
    [
        (dict(guidance_schedule="oscillating"), [2, 1, 2, 1]),
        (dict(guidance_schedule="interval", guidance_interval=(0.4, 0.8)), [1, 2, 2, 1]),
        (dict(guidance_schedule="linear"), [1, 2, 2, 2]),
    ],
)
def test_guidance_follows_its_schedule(pipe, monkeypatch, settings, halves):
    batches = []
    predict = GuidedModel.predict
    monkeypatch.setattr(
        GuidedModel, "predict", lambda self, x, *rest: batches.append(len(x)) or predict(self, x, *rest)
    )
    scheduled = latents(pipe, guidance_scale=4.0, num_inference_steps=4, **settings)
    assert batches == halves
    constant = latents(pipe, guidance_scale=4.0, num_inference_steps=4)
    assert not torch.allclose(scheduled, constant, atol=1e-3)


def test_rescaled_guidance_has_the_spread_of_unguided_velocity(pipe, monkeypatch):
    seen = []
    predict = GuidedModel.predict
    monkeypatch.setattr(GuidedModel, "predict", lambda *args: seen.append(predict(*args)) or seen[-1])
    found = latents(pipe, guidance_scale=9.0, guidance_rescale=1.0, num_inference_steps=1, shift=1.0)
    start = torch.randn(1, 3, 4, 8, 8, generator=seeded(1)[0])
    step, (unconditional, conditional) = found - start, seen[0].chunk(2)
    torch.testing.assert_close(step.std(), conditional.std(), rtol=1e-4, atol=0)
    guided = unconditional + 9 * (conditional - unconditional)
    torch.testing.assert_close(step, guided * conditional.std() / guided.std(), rtol=1e-4, atol=1e-5)
    half = latents(pipe, guidance_scale=9.0, guidance_rescale=0.5, num_inference_steps=1, shift=1.0) - start
    torch.testing.assert_close(half, (step + guided) / 2, rtol=1e-4, atol=1e-5)


def test_the_euler_steps_are_those_of_the_scheduler(pipe):
    """Against the loop written out for one prompt, without guidance."""
    states, mask = pipe.prompt_encoder.encode([PROMPTS[0]])
    scalar = lambda value: torch.tensor([float(value)])  # noqa: E731
    x = torch.randn(1, 3, 4, 8, 8, generator=seeded(1)[0])
    sigmas = shift_t(torch.linspace(1, 0, 4), 2.0)
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        with torch.no_grad():
            output = pipe.transformer(
                x, scalar(1000 * now), states, mask, scalar(8), scalar(8), scalar(8)
            ).sample
        x = x + (now - after) * pipe.flow.velocity(output, x, now.expand(1, 4))
    torch.testing.assert_close(latents(pipe, guidance_scale=1.0, shift=2.0), x, atol=1e-5, rtol=1e-5)


def test_output_types(pipe):
    arrays = pipe(PROMPTS, generator=seeded(1, 2), output_type="np").frames
    tensors = pipe(PROMPTS, generator=seeded(1, 2), output_type="pt").frames
    pictures = pipe(PROMPTS, generator=seeded(1, 2), output_type="pil").frames
    assert arrays.shape == (2, 4, 8, 8, 3) and arrays.min() >= 0 and arrays.max() <= 1
    assert np.allclose(tensors.permute(0, 1, 3, 4, 2).numpy(), arrays)
    assert np.abs(np.array(pictures[1][2]) / 255 - arrays[1, 2]).max() <= 0.5 / 255 + 1e-6
    assert latents(pipe).shape == (1, 3, 4, 8, 8)
    (frames,) = pipe(PROMPTS[0], generator=seeded(1), output_type="np", return_dict=False)
    assert frames.shape == (1, 4, 8, 8, 3)


def test_sizes_not_divisible_by_patch_or_stride(any_pipe):
    frames = any_pipe("a star", num_frames=5, height=10, width=7, output_type="np").frames
    assert frames.shape == (1, 5, 10, 7, 3)


def test_callback_gets_and_replaces_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    assert torch.equal(latents(pipe, callback_on_step_end=callback), torch.zeros(1, 3, 4, 8, 8))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_frames=0), "num_frames = 0"),
        (dict(height=0), "height = 0"),
        (dict(width=-8), "width = -8"),
        (dict(fps=0), "fps = 0"),
        (dict(fps=1e-4), "fps = 0.0001"),
        (dict(num_inference_steps=0), "num_inference_steps = 0"),
        (dict(guidance_scale=-1), "guidance_scale = -1"),
        (dict(guidance_scale=float("nan")), "guidance_scale = nan"),
        (dict(guidance_schedule="cosine"), "guidance_schedule = cosine: must be one of constant, linear"),
        (dict(guidance_interval=(0.5, 0.2)), r"guidance_interval = \[0.5, 0.2\]"),
        (dict(guidance_rescale=1.5), "guidance_rescale = 1.5"),
        (dict(num_frames="8"), "num_frames = '8': has a wrong type: must be a number"),
        (dict(guidance_interval=(0, "1")), "has a wrong type: must be a number"),
        (dict(guidance_interval=0.5), "guidance_interval = 0.5: must be two rising noise levels"),
        (dict(refine_pairs=-1), "refine_pairs = -1"),
        (dict(refine_pairs=1, refine_level=1.0), "refine_level = 1.0"),
        (dict(refine_pairs=1, refine_guidance_scale=-1), "refine_guidance_scale = -1"),
        (dict(shift=0.0), "shift = 0"),
        (dict(prompt=[]), "prompt = "),
        (dict(prompt=[3]), "prompt = "),
        (dict(generator=[torch.Generator()] * 3), "3 values of generator for 1 prompts"),
        (dict(negative_prompt=["a", "b"]), "2 values of negative_prompt"),
        (dict(output_type="mp4"), "output_type = 'mp4'"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "noise"),
        (dict(image=torch.zeros(8, 8)), "image is"),
        (dict(image=torch.full((3, 8, 8), 7.0)), "values from 7"),
        (dict(image="absent.png"), "absent.png: file missing"),
        (dict(image=3), "image is int"),
        (dict(image=torch.zeros(3, 8, 8), num_frames=1), "1 latent frame, and all are conditioning frames"),
    ],
)
def test_bad_arguments_are_named(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a star", **settings})


def test_images_of_all_types_become_the_same_frame():
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    frame = image_to_frame(PIL.Image.fromarray(levels), 8, 8)
    assert frame.shape == (3, 1, 8, 8)
    assert torch.equal(frame, image_to_frame(levels, 8, 8))
    torch.testing.assert_close(frame, image_to_frame(levels.astype(np.float32) / 255, 8, 8))
    torch.testing.assert_close(
        frame, image_to_frame(torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1, 8, 8)
    )


def test_an_image_of_another_size_is_scaled_and_cropped(caplog):
    levels = np.zeros((20, 40, 3), dtype=np.uint8)
    levels[:, 10:30] = 255  # the middle square, which is what remains
    frame = image_to_frame(levels, 10, 10)
    assert frame.shape == (3, 1, 10, 10)
    assert frame[:, :, :, 1:-1].min() > 0.99
    assert "40x20" in caplog.text and "10x10" in caplog.text


def test_save_and_load_give_the_same_latents(any_pipe, tmp_path):
    any_pipe.save_pretrained(tmp_path / "pipeline")
    files = [path for path in (tmp_path / "pipeline").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".model"}
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["_class_name"] == "STDiTPipeline"
    loaded = STDiTPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert_same(latents(loaded), latents(any_pipe))
    assert loaded.config["num_inference_steps"] == 3 and loaded.config["guidance_scale"] == 2.0
    changed = STDiTPipeline.from_pretrained(
        tmp_path / "pipeline", torch_dtype=torch.bfloat16, vae=any_pipe.vae, num_frames=2
    )
    assert (
        changed.vae is any_pipe.vae
        and changed.transformer.dtype == torch.bfloat16
        and changed.config.num_frames == 2
    )


def test_settings_are_listed_once(pipe, tmp_path):
    """The signatures, the recorded config and the model index follow `VideoSettings`."""
    names = [field.name for field in fields(VideoSettings)]
    init, call = (
        inspect.signature(function).parameters for function in (STDiTPipeline, STDiTPipeline.__call__)
    )
    assert [name for name in init if name in names] == [name for name in call if name in names] == names
    assert init["num_inference_steps"].default == 30 and call["num_inference_steps"].default is None
    assert not [p for p in (*init.values(), *call.values()) if p.kind is p.VAR_KEYWORD]
    assert set(names) | {"step"} <= set(pipe.config)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert set(names) <= set(json.loads((tmp_path / "pipeline/model_index.json").read_text()))
    new = STDiTPipeline(**pipe.components, width=64)
    assert (new.config.width, new.config.height, new.config.guidance_interval) == (64, 32, (0.0, 1.0))


def test_an_unknown_setting_is_a_type_error_naming_the_nearest(pipe, tmp_path):
    with pytest.raises(
        TypeError, match=r"STDiTPipeline.__call__\(\) has no .*'num_frame': did you mean 'num_frames'"
    ):
        pipe("a star", num_frame=3)
    with pytest.raises(TypeError, match="'sigmas': the noise levels are those of num_inference_steps"):
        pipe("a star", sigmas=[1.0, 0.5])
    with pytest.raises(TypeError, match="'generators': did you mean 'generator'"):
        pipe("a star", generators=[])
    with pytest.raises(TypeError, match="'guidance': did you mean 'guidance_"):
        STDiTPipeline(**pipe.components, guidance=2.0)
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(TypeError, match="'fsp': did you mean 'fps'"):
        STDiTPipeline.from_pretrained(tmp_path / "pipeline", fsp=2)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="model_index.json"):
        STDiTPipeline.from_pretrained(tmp_path)


def test_a_pipeline_from_the_components_of_another(any_pipe):
    again = STDiTPipeline.from_pipe(any_pipe, fps=6.0)
    assert again.components == any_pipe.components
    assert {name for name, value in again.config.items() if value != any_pipe.config.get(name)} == {"fps"}
    assert_same(latents(again, fps=8.0), latents(any_pipe))
    other = tiny_model(any_pipe.codec.channels)
    assert STDiTPipeline.from_pipe(any_pipe, transformer=other).transformer is other
    of_diffusers = WanPipeline(None, None, None, None, transformer=AutoencoderKL())
    with pytest.raises(TypeError, match="missing .* 'transformer'"):
        STDiTPipeline.from_pipe(of_diffusers)


def test_a_codec_keeps_its_tiles(tmp_path):
    """Also the wrapper of a VAE of diffusers, and when another component is replaced."""
    name = "AutoencoderKLWan"
    path = str(save_tiny_vae(name, tmp_path / "vae"))
    pipe = tiny_pipeline(tmp_path, build_codec(CodecConfig(name=name, path=path, tile=128)))
    assert pipe.codec.tile == 128 and pipe.codec.vae is pipe.vae
    pipe.register_modules(text_encoder=None, tokenizer=None)
    assert pipe.codec.tile == 128
    pipe.vae = build_codec(CodecConfig(name=name, path=path)).vae
    assert pipe.codec.tile == "auto" and pipe.codec.vae is pipe.vae


def test_to_casts_all_but_codecs_of_stdit(tmp_path):
    pipe = tiny_pipeline(tmp_path).to("cpu", torch.bfloat16)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32 and pipe.device.type == "cpu"
    assert latents(pipe).dtype == torch.float32


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(guidance_scale=1, guidance_rescale=0.5), "guidance_rescale = 0.5 would have no effect"),
        (dict(refine_level=0.3), "refine_level = 0.3 would have no effect"),
        (dict(refine_guidance_scale=2), "refine_guidance_scale = 2 would have no effect"),
        (dict(guidance_interval=(0.1, 0.5)), "guidance_interval is for guidance_schedule = interval"),
        (dict(image=torch.zeros(3, 2, 8, 8)), "a video, but only the first frame is an image"),
    ],
)
def test_an_argument_without_effect_is_an_error(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        pipe("a", **settings)
