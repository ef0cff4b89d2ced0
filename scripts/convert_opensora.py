"""Convert a checkpoint of Open-Sora v1.2's STDiT3 to a model folder or a pipeline, or back.

    python scripts/convert_opensora.py OpenSora-STDiT-v3 outputs/stdit
    python scripts/convert_opensora.py OpenSora-STDiT-v3 outputs/opensora --codec OpenSora-VAE --text_encoder t5-xxl
    python scripts/convert_opensora.py outputs/stdit OpenSora-again --reverse
    python scripts/convert_opensora.py outputs/opensora-finetuned OpenSora-finetuned --reverse

SRC is a folder or a file: .safetensors, or .pth, .pt or .bin, which is read as weights only; also in shards. DST is
created: config.json and safetensors, which train.py --init_from and STDiT.from_pretrained take. With a codec and a
text encoder it is a whole pipeline for sample.py --checkpoint. With --reverse, SRC is either of these, or a run or
one of its checkpoints (of which the averaged weights are taken), and DST gets the keys and the config.json of
Open-Sora. Tensors stay bit for bit.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.training.disk import replace_folder

if TYPE_CHECKING:
    from torch import Tensor

    from stdit.models.stdit import STDiT
    from stdit.pipelines.pipeline import STDiTPipeline


def convert(
    source: Path, folder: Path, codec: Path | None, text_encoder: Path | None, **settings: int
) -> str:
    """Write the STDiT of an Open-Sora checkpoint into a new folder; return a summary."""
    from stdit.models.opensora import ROTARY, read_checkpoint
    from stdit.models.stdit import STDiT

    if is_of_stdit(source):
        raise UserError(
            f"{source} is a run, a checkpoint or a pipeline of stdit, and no checkpoint of Open-Sora: add --reverse "
            "to convert it to Open-Sora's keys, or give it to sample.py --checkpoint as it is."
        )
    state, recorded = read_checkpoint(source)
    model = STDiT.from_opensora(state, **(recorded | settings))
    pipe = build_pipeline(model, codec, text_encoder) if codec and text_encoder else None
    with replace_folder(f"model {folder}", folder, parents=True) as aside:
        if pipe is not None:
            pipe.save_pretrained(aside)
        else:
            model.save_pretrained(aside)
    summary = (
        f"{folder}: {model.num_parameters():,} weights, {model.config.depth} + {model.config.depth} blocks"
    )
    skipped = f"; skipped {ROTARY}, a constant that the model computes itself" if ROTARY in state else ""
    return summary + skipped


def build_pipeline(model: "STDiT", codec_folder: Path, text_encoder_folder: Path) -> "STDiTPipeline":
    """Build a pipeline that samples as Open-Sora v1.2 does: 2 seconds of 240p, 30 steps, guidance 7."""
    from stdit.codecs import CodecConfig, TextEncoderConfig, build_codec, build_text_encoder
    from stdit.data.config import LENGTHS, resolve_size
    from stdit.diffusion.config import FlowConfig
    from stdit.diffusion.scheduler import RectifiedFlow
    from stdit.pipelines.pipeline import STDiTPipeline

    codec = build_codec(CodecConfig(name="opensora", path=str(codec_folder)))
    max_length = model.config.model_max_length
    text_encoder = build_text_encoder(
        TextEncoderConfig("t5", str(text_encoder_folder), max_length=max_length, clean_captions=True)
    )
    for part, found, wanted in (
        ("codec", codec.channels, model.config.in_channels),
        ("text encoder", text_encoder.channels, model.config.caption_channels),
    ):
        if found != wanted:
            raise UserError(
                f"the {part} gives {found} channels, but the model was made for {wanted}: give another {part}."
            )
    height, width = resolve_size("240p", "16:9")
    return STDiTPipeline(
        model,
        codec,
        text_encoder,
        None,
        RectifiedFlow(),
        flow=FlowConfig(shift_by_size=True, conditioning={"first": 0.22}),  # as in its last stage
        num_frames=LENGTHS["2s"],
        height=height,
        width=width,
        fps=24,
        num_inference_steps=30,
        guidance_scale=7.0,
    )


def convert_back(source: Path, folder: Path) -> str:
    """Write an STDiT as an Open-Sora checkpoint into a new folder; return a summary."""
    from safetensors.torch import save_file

    from stdit.models.opensora import to_opensora

    weights, settings, prediction, inside = _read_stdit(source)
    state, config = to_opensora(weights, settings, prediction)

    with replace_folder(f"checkpoint {folder}", folder, parents=True) as aside:
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return f"{folder}: {len(state)} tensors of Open-Sora's STDiT3, from {inside}"


def _read_stdit(source: Path) -> tuple[Mapping[str, "Tensor"], Mapping[str, Any], str, Path]:
    """Read the STDiT of a run, checkpoint, pipeline or model folder.

    Returns:
        weights, settings, the meaning of its output (that of Open-Sora where none is recorded), and where it was.
    """
    import torch

    from stdit.checkpoint_files import read_json, read_meta, verify_if_sealed
    from stdit.models.opensora import check_keys, read_weights, stdit_names
    from stdit.models.stdit import STDiT
    from stdit.pipelines.loading import pipeline_settings
    from stdit.pipelines.sources import find_checkpoint_source
    from stdit.pipelines.weights import load_transformer

    inside, prediction = source, "velocity"
    if is_of_stdit(source):
        found = find_checkpoint_source(source)
        if not found.is_pipeline:
            meta = read_meta(found.path)
            model, used = load_transformer(found.path, meta, ema=True)
            prediction = meta["config"]["flow"]["prediction"]
            return model.state_dict(), model.config, prediction, found.path / used
        inside = found.path / "transformer"
        prediction = pipeline_settings(found)["flow"]["prediction"]
    verify_if_sealed(inside)
    recorded = read_json(inside / "config.json", "a model folder")
    if recorded.get("_class_name") != "STDiT":
        raise UserError(f"{inside} holds no STDiT: give a folder that this script or training made.")
    with torch.device("meta"):
        model = STDiT.from_config(recorded)
    rename = stdit_names(model.config)
    weights = {rename(name): tensor for name, tensor in read_weights(inside).items()}
    check_keys(weights, model.state_dict())
    return weights, model.config, prediction, inside


def is_of_stdit(folder: Path) -> bool:
    """Return whether a folder is a run, a checkpoint or a pipeline of stdit."""
    from stdit.pipelines.sources import MODEL_INDEX, is_checkpoint

    run = any((folder / name).is_dir() for name in ("checkpoints", "pipeline"))
    return run or (folder / MODEL_INDEX).is_file() or is_checkpoint(folder)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint to read")
    parser.add_argument("folder", metavar="DST", type=Path, help="folder to make")
    parser.add_argument(
        "--reverse", action="store_true", help="from a run, pipeline or model folder to Open-Sora"
    )
    parser.add_argument("--codec", type=Path, help="folder of Open-Sora's VAE, for a pipeline")
    parser.add_argument("--text_encoder", type=Path, help="folder of its T5, for a pipeline")
    parser.add_argument(
        "--num_heads", type=int, help="of a model without qk_norm, if SRC does not contain it"
    )
    parser.add_argument("--input_sq_size", type=int, help="if config.json does not contain it (512)")
    args = parser.parse_args()
    settings = {n: v for n in ("num_heads", "input_sq_size") if (v := getattr(args, n)) is not None}
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: choose another DST, or move it away.")
    if bool(args.codec) != bool(args.text_encoder):
        raise UserError("a pipeline needs both --codec and --text_encoder: give the other, too, or neither.")
    if args.reverse and (settings or args.codec):
        raise UserError("--reverse takes only SRC and DST: the settings are those of SRC.")
    if args.reverse:
        print(convert_back(args.source, args.folder))
    else:
        print(convert(args.source, args.folder, args.codec, args.text_encoder, **settings))


if __name__ == "__main__":
    run(main)
