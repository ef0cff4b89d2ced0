"""Convert an adapter (LoRA) to the names of another program, or merge adapters into full weights.

    python scripts/convert_lora.py lora.safetensors --to comfyui --output comfyui.safetensors
    python scripts/convert_lora.py kohya.safetensors --to peft --output lora
    python scripts/convert_lora.py lora.safetensors:0.8 style --merge_into outputs/clips --output outputs/merged

SRC is a file, or a folder with one, with the names of peft (as stdit and diffusers write it), kohya's scripts or
ComfyUI. With --merge_into, each SRC may have a weight. What it merges into is a run, a checkpoint or a pipeline, and
DST is then a pipeline for sample.py --checkpoint and train.py --init_from; or a model folder, and so is DST.
"""

from pathlib import Path

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.lora.config import LoRASpec, parse_lora
from stdit.pipelines.writer import check_writable
from stdit.training.disk import disk_errors, replace_folder

FORMATS = ("peft", "kohya", "comfyui")


def convert(source: Path, target: str, output: Path) -> str:
    """Write an adapter with the names of ``target``; return a summary."""
    from stdit.lora.files import adapter_header, read_adapter, write_adapter, write_tensors
    from stdit.lora.names import to_other_names

    adapter = read_adapter(source)
    if target == "peft":
        with disk_errors(f"adapter {output}", output):  # which is new
            file = write_adapter(
                output, adapter.weights, adapter.settings, adapter.base_hash, adapter.trigger
            )
        return f"{file}: {len(adapter.weights)} weights with the names of peft"
    if adapter.settings is None:
        raise UserError(
            f"{source}: its header has no settings of peft, so that its alpha is unknown: save it by "
            "save_lora_weights with transformer_lora_adapter_metadata=pipe.transformer.peft_config[NAME].to_dict()."
        )
    weights = to_other_names(adapter.weights, adapter.settings, "kohya" if target == "kohya" else "comfyui")
    file = output if output.suffix == ".safetensors" else output / f"{target}.safetensors"
    with disk_errors(f"adapter {output}", output):
        write_tensors(file, weights, adapter_header(adapter.base_hash, adapter.trigger))
    return f"{file}: {len(weights)} weights with the names of {target}"


def merge(loras: list[LoRASpec], base: Path, output: Path, any_base: bool) -> str:
    """Write full weights with adapters in them; return a summary."""
    from stdit.lora.files import merge_adapters
    from stdit.models.stdit import STDiT
    from stdit.pipelines.loading import load_pipeline

    if (base / "config.json").is_file():
        model = STDiT.from_pretrained(base)
        merge_adapters(model, loras, any_base, "--other_base")
        with replace_folder(f"model {output}", output, parents=True) as aside:
            model.save_pretrained(aside)
    else:
        pipe, _ = load_pipeline(base)
        merge_adapters(pipe.transformer, loras, any_base, "--other_base")
        with replace_folder(f"pipeline {output}", output, parents=True) as aside:
            pipe.save_pretrained(aside)
    return f"{output}: {base} with " + " and ".join(f"{lora.weight:g} x {lora.file}" for lora in loras)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("sources", metavar="SRC", nargs="+", help="adapter; to merge it, also SRC:WEIGHT")
    parser.add_argument("--output", metavar="DST", type=Path, required=True, help="file or folder to make")
    parser.add_argument("--to", choices=FORMATS, help="names that the adapter gets")
    parser.add_argument(
        "--merge_into", metavar="BASE", type=Path, help="run, checkpoint, pipeline or model folder"
    )
    parser.add_argument(
        "--other_base", action="store_true", help="merge although it was trained on other weights"
    )
    args = parser.parse_args()
    if (args.to is None) == (args.merge_into is None):
        raise UserError("give --to or --merge_into: one of them.")
    check_writable(args.output.absolute().parent)
    if args.output.exists():
        raise UserError(f"output {args.output}: exists already: remove it, or choose another name.")
    loras = [parse_lora(source) for source in args.sources]
    if args.merge_into is not None:
        print(merge(loras, args.merge_into, args.output, args.other_base))
        return
    if len(loras) > 1 or loras[0].weight != 1 or args.other_base:
        raise UserError("several SRC, weights and --other_base are for --merge_into: give one SRC.")
    print(convert(loras[0].file, args.to, args.output))


if __name__ == "__main__":
    run(main)
