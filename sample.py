"""Generate videos from prompts.

    python sample.py --checkpoint outputs/quickstart --prompt "a red ball rises"
    python sample.py --checkpoint outputs/quickstart --prompts prompts.csv --num_samples 2
    python sample.py --config configs/sample/quickstart.yaml --image first_frame.png --output outputs/mine
    python sample.py --checkpoint outputs/opensora --config configs/sample/240p-2s.yaml --prompt "waves at dusk"
    python sample.py --checkpoint outputs/opensora --list_sizes

--checkpoint takes a run (its newest whole checkpoint or exported pipeline), one checkpoint of a run, or
a pipeline folder. Every video is an .mp4 with its settings inside and in a .json beside it; sheet.png shows
them all. Nothing is overwritten. A GPU is used if there is one; everything works without.
"""

from stdit.cli import parse, run
from stdit.pipelines.config import SampleConfig


def main() -> None:
    assert __doc__ is not None
    description, _, examples = __doc__.partition("\n\n")
    config = parse(SampleConfig, description=description, examples=examples)
    # After parsing, so that --help is quick.
    if config.list_sizes:
        from stdit.pipelines.sizes import list_sizes

        print(list_sizes(config))
    else:
        from stdit.pipelines.sampling import sample_to_files

        sample_to_files(config)


if __name__ == "__main__":
    run(main)
