"""Generate videos from prompts.

    python sample.py --prompt "a red star moves to the right" --prompt "a green heart bounces"
    python sample.py --checkpoint outputs/quickstart --prompt "a red ball rises"
    python sample.py --checkpoint outputs/quickstart --prompts prompts.csv --num_samples 2
    python sample.py --checkpoint outputs/clips --prompt "a wave rises" --image first.png
    python sample.py --checkpoint outputs/clips --prompt "a wave rises" --segment_prompts "it breaks"
    python sample.py --checkpoint outputs/opensora --config sample/240p-2s --prompt "waves at dusk"
    python sample.py --serve                                   # a page in the browser, and an API
    python sample.py --checkpoint outputs/opensora --list_sizes
    python sample.py --checkpoint outputs/opensora --dry_run 8 --parallel.sp 4 --resolution 720p --aspect_ratio 16:9

--checkpoint takes a run (its newest complete checkpoint or exported pipeline), one checkpoint of a run, or a
pipeline folder; without it, the small model that comes with stdit is used. Each video is an .mp4 with its settings
inside and in a .json beside it; sheet.png shows all videos. The same command again makes only what is missing; no
video is overwritten. A GPU is used if there is one. scripts/contact_sheet.py shows the videos of a training run
across its steps. More: stdit/pipelines/README.md.
"""

from typing import NoReturn

from stdit.cli import run


def sample_command() -> NoReturn:
    """Run the command stdit-sample."""
    run(main)


def main() -> None:
    """Read the flags, and write the videos, or serve the page."""
    from stdit.serve.config import SampleCommand  # here, so that Ctrl-C meanwhile prints no traceback
    from stdit.settings import parse

    config = parse(SampleCommand, doc=__doc__)
    # After parsing, so that --help is quick.
    if config.serve:
        from stdit.serve.api.server import serve

        serve(config)
    elif config.list_sizes:
        from stdit.pipelines.sizes import list_sizes

        print(list_sizes(config))
    elif config.dry_run is not False:
        from stdit.pipelines.dry_run import print_plan

        print_plan(config)
    else:
        from stdit.pipelines.sampling import sample_to_files

        sample_to_files(config)
