"""Make the picture in the README: videos of the model that comes with stdit, with and without conditioning frames.

    python scripts/readme_picture.py

All videos have seed 0.
"""

from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

from stdit.cli import run, script_parser

PICTURE = Path(".github/samples.png")
STAR = "a cyan star moves to the left on a black background"
HEART = "a green heart rises on a grey background"
ROWS: dict[str, tuple[str, ...]] = {
    "a pink star bounces on a vertically striped background": (),
    "a cyan star grows on a white background": (),
    "an orange star orbits a green star on a black background": (),
    "a cyan cross follows a yellow triangle on a black background": (),
    "a cyan star rises on a black background": ("star.png@0",),
    STAR: ("star.png@0", "end.png@-1"),
    "a green heart falls on a grey background": ("heart.mp4@0:9",),
}
"""Prompts, and what they are conditioned on: the two ends of a video of `STAR`, nine frames of one of `HEART`."""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="PNG", help=f"default: {PICTURE}")
    output = parser.parse_args().output
    from PIL import Image

    from stdit.pipelines import Request, VideoSettings, VideoWriter, load_pipeline, sample_videos
    from stdit.pipelines.conditions import parse_frame_condition
    from stdit.pipelines.video_io import write_mp4
    from stdit.pipelines.writer import check_output_file

    check_output_file(output, "samples.png")
    pipe, weights = load_pipeline()
    with TemporaryDirectory() as made:
        folder = Path(made)
        sources = [Request(prompt, 0, VideoSettings()) for prompt in (STAR, HEART)]
        star, heart = (video.frames for video in sample_videos(pipe, sources))
        Image.fromarray(star[0]).save(folder / "star.png")
        Image.fromarray(star[-1]).save(folder / "end.png")
        write_mp4(folder / "heart.mp4", heart, pipe.config.fps)
        rows = [
            Request(
                prompt,
                0,
                VideoSettings(),
                conditions=tuple(parse_frame_condition(f"{folder}/{text}") for text in conditions),
            )
            for prompt, conditions in ROWS.items()
        ]
        writer = VideoWriter(
            folder / "rows", ["png"], pipe.config, {"checkpoint_hash": weights}, lambda path: None
        )
        writer.write(sample_videos(pipe, rows))
        writer.finish()
        copyfile(folder / "rows" / "sheet.png", output)
    print(output)


if __name__ == "__main__":
    run(main)
