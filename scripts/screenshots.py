"""Write pictures of the page for people to look at: a server with the bundled model, driven in Chromium.

    python scripts/screenshots.py                                     # make and gallery, into outputs/screenshots
    python scripts/screenshots.py --runs outputs/quickstart           # also the view of runs, with copies of these
    python scripts/screenshots.py --readme                            # .github/page.png

The server makes a few videos in a temporary folder. Each view is shown light and dark, on a desktop (1280 pixels
wide) and on a phone (380). Needs the extra dev and Chromium.
"""

import io
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where scripts.* is found

from scripts.arguments import positive_int
from scripts.bench.serving import served
from scripts.browser import find_chromium, open_browser
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.serve.client import VideoClient

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PICTURE = Path(".github/page.png")
COLORS = 256
"""Of the picture in the README, which is thereby about half as large."""
FINISHED = (
    "a green heart rises on a grey background",
    "a cyan star grows on a white background",
    "an orange star orbits a green star on a black background",
    "a pink star bounces on a vertically striped background",
)
FORMING = "a cyan cross follows a yellow triangle on a black background"
STEPS = 600
"""Of the video that forms: enough for a picture to be taken meanwhile."""
SHOWN_AT = 45
"""Percent of its steps at which its preview shows what it will be."""
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 380, "height": 800}, "is_mobile": True, "has_touch": True},
}
SCHEMES = ("light", "dark")


@contextmanager
def forming_video(client: VideoClient) -> Iterator[None]:
    """Make a video during a block, from when its preview shows something; delete it afterwards."""
    video = client.create(FORMING, seed=0, num_inference_steps=STEPS)
    try:
        while client.get(video)["progress"] < SHOWN_AT:
            time.sleep(0.1)
        yield
    finally:
        client.delete(video)


def open_view(browser: "Browser", client: VideoClient, view: str, **options: Any) -> "Page":
    """Open a view of the page, and wait until its pictures are there."""
    page = browser.new_context(**options).new_page()
    page.goto(f"{client.url}/#{view}")
    waited = {
        "make": "img.preview",
        "gallery": f"#gallery-items li:nth-child({len(FINISHED)}) img",
        "runs": ".plot polyline",
    }
    page.locator("#model option").first.wait_for(state="attached")
    page.locator(waited[view]).first.wait_for(state="attached")
    if view == "make":
        page.get_by_label("Prompt", exact=True).fill(FORMING)
    page.wait_for_timeout(1000)  # videos play, the estimate is shown
    return page


def write_views(browser: "Browser", client: VideoClient, views: list[str], folder: Path) -> None:
    """Write a picture of each view, scheme and screen."""
    for view, scheme, (name, screen) in itertools.product(views, SCHEMES, SCREENS.items()):
        with forming_video(client) if view == "make" else nullcontext():
            page = open_view(browser, client, view, color_scheme=scheme, **screen)
            page.screenshot(path=folder / f"{view}-{scheme}-{name}.png", full_page=True)
            page.context.close()


def write_readme_picture(browser: "Browser", client: VideoClient) -> None:
    """Write the view in which videos are made: one forms, one is finished."""
    import PIL.Image

    with forming_video(client):
        page = open_view(browser, client, "make", viewport={"width": 1280, "height": 860})
        picture = PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLORS).save(PICTURE, optimize=True)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/screenshots"), metavar="FOLDER")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="FOLDER", help="runs to show")
    parser.add_argument("--readme", action="store_true", help=f"write {PICTURE} alone")
    parser.add_argument("--port", type=positive_int, default=8767)
    args = parser.parse_args()
    find_chromium()
    if missing := [one for one in args.runs if not one.is_dir()]:
        raise UserError(f"--runs {missing[0]}: there is no such folder: name that of a run.")
    with tempfile.TemporaryDirectory(prefix="stdit-screenshots-") as temporary:
        for one in args.runs:
            shutil.copytree(one, Path(temporary) / one.resolve().name)
        with served(Path(temporary), args.port, []) as client, open_browser() as browser:
            for video in [client.create(prompt, seed=0) for prompt in FINISHED]:
                client.wait(video)
            if args.readme:
                write_readme_picture(browser, client)
                print(PICTURE)
                return
            args.output.mkdir(parents=True, exist_ok=True)
            write_views(browser, client, ["make", "gallery", *(["runs"] if args.runs else [])], args.output)
            print(args.output)


if __name__ == "__main__":
    run(main)
