"""The page in Chromium, on a server as its users start it."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.browser import open_browser
from stdit.errors import UserError
from stdit.pipelines.video_io import read_frames
from tests.serve.browser import (
    PHONE,
    Browser,
    Locator,
    Page,
    ask,
    card,
    cards,
    drop_file,
    expect,
    has_status,
    milliseconds_of_clicks,
    open_page,
    show,
    tab_to,
)
from tests.serve.run_folders import locked, make_checkpoint, make_run, write_metrics
from tests.serve.servers import Served
from tests.serve.small_videos import SmallVideos

QUICK = {"num_inference_steps": 4, "refine_pairs": 0}
ENDLESS = 4000
"""Steps of a video that no test waits for."""
VIEWS = ("Make", "Gallery", "Runs")
CLICKS = [
    ("nav a[href='#gallery']", "#view-gallery:not([hidden])"),
    ("nav a[href='#runs']", "#view-runs:not([hidden])"),
    ("nav a[href='#make']", "#view-make:not([hidden])"),
    ("#more-settings summary", "#more-settings[open]"),
    ("#more-settings summary", "#more-settings:not([open])"),
    ("#lock-seed", "#lock-seed[aria-pressed=true]"),
    ("#lock-seed", "#lock-seed[aria-pressed=false]"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose worker has loaded the bundled model; it has a run, too."""
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "outputs" / "shapes", steps=400, done=200)
    for step in (100, 200):
        SmallVideos(run / "samples" / f"step-{step:08d}").make("00-circle.mp4", "a circle of a run")
    make_checkpoint(run, 200)
    one = Served(folder, "--server.requests_per_second", "1000")
    try:
        one.wait_for("idle")
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(served: Served, browser: Browser) -> Iterator[Page]:
    """The page in a window of a desktop; afterwards no video is left under way, and no script has failed."""
    page, failures = open_page(browser, served.client.url), list[str]()
    page.on("pageerror", lambda error: failures.append(str(error)))
    yield page
    for context in browser.contexts:
        context.close()
    for status in ("in_progress", "queued"):
        for video in served.client.request("GET", f"/v1/videos?status={status}")["data"]:
            served.client.cancel(video)
    assert failures == []


def make(served: Served, prompt: str, **settings: Any) -> dict[str, Any]:
    """Make a video without the page."""
    return served.client.wait(served.client.create(prompt, **QUICK | settings))


def file_of(served: Served, video: dict[str, Any]) -> Path:
    return served.folder / "outputs" / "served" / str(video["file"])


def newest(served: Served, prompt: str) -> dict[str, Any]:
    """Return the newest video of a prompt."""
    videos = served.client.request("GET", "/v1/videos?limit=40&order=desc")["data"]
    return next(one for one in videos if one["prompt"] == prompt)


def seed_of(one: Locator) -> str:
    found = re.search(r"seed (\d+)", one.inner_text())
    assert found is not None
    return found[1]


def plays(video: Locator) -> None:
    """Wait until a video plays, and check that it does so in a loop."""
    expect(video).to_be_visible()
    expect(video).to_have_js_property("paused", False)
    expect(video).not_to_have_js_property("currentTime", 0)
    assert video.evaluate("(video) => video.loop && video.muted && !video.error")


# Make


def test_lines_that_were_queued_leave_the_form_when_a_later_one_is_refused(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a ball of several lines\n" + 5000 * "x")
    page.locator("[name=num_inference_steps]").fill("2")
    page.locator("#make-button").click()
    expect(page.locator("#make-error")).to_contain_text(
        "1 of 2 videos are queued; the next one was refused: prompt:"
    )
    expect(prompt).to_have_value(5000 * "x")
    expect(card(page, "a ball of several lines")).to_be_visible()


def test_make_is_filled_while_it_is_pointed_at(page: Page) -> None:
    style = "(one) => ['color', 'backgroundColor'].map((name) => getComputedStyle(one)[name])"
    text, background = page.locator("#make-button").evaluate(style)
    page.locator("#make-button").hover()
    pointed_text, pointed_background = page.locator("#make-button").evaluate(style)
    draft = page.locator("#draw-seed")
    draft.hover()
    assert pointed_text == text != background != pointed_background != draft.evaluate(style)[1]


def test_a_video_forms_plays_and_is_downloaded(served: Served, page: Page, tmp_path: Path) -> None:
    prompt = "a red star orbits a blue square on a white background"
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps", exact=True).first.fill("120")
    expect(page.locator("#estimate")).to_contain_text("model calls")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    preview = card(page, prompt).locator("img.preview")
    preview.wait_for()
    first = preview.get_attribute("src")
    assert first is not None and first.startswith("data:image/webp")
    expect(preview).not_to_have_attribute("src", first)
    has_status(card(page, prompt), "of 128")

    plays(card(page, prompt).locator("video"))
    has_status(card(page, prompt), "Made in")
    with page.expect_download() as download:
        card(page, prompt).get_by_role("link", name="Download").click()
    download.value.save_as(saved := tmp_path / "saved.mp4")
    assert saved.read_bytes() == file_of(served, newest(served, prompt)).read_bytes()
    assert read_frames(saved, 99).shape == (25, 64, 64, 3)


def test_a_finished_video_is_removed_once_that_is_confirmed(
    served: Served, browser: Browser, page: Page
) -> None:
    prompt = "a video that is removed"
    file, other = file_of(served, make(served, prompt)), open_page(browser, served.client.url)
    expect(card(other, prompt)).to_be_visible()
    dialog = page.get_by_role("dialog", name="Remove this video?")
    card(page, prompt).get_by_role("button", name="Remove").click()
    dialog.get_by_role("button", name="Keep").click()
    expect(dialog).to_be_hidden()
    assert file.is_file() and cards(page, prompt).count() == 1
    card(page, prompt).get_by_role("button", name="Remove").click()
    dialog.get_by_role("button", name="Remove").click()
    for one in (page, other):
        expect(cards(one, prompt)).to_have_count(0)
    assert not file.exists()


def test_a_prompt_with_a_line_break_stays_one_prompt(served: Served, page: Page) -> None:
    make(served, "a star\r\n\n and a square")
    page.get_by_role("article", name="a star").filter(has_text="and a square").get_by_role(
        "button", name="Use these settings"
    ).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a star and a square")


def test_cancel_frees_the_worker_for_the_next_video(page: Page) -> None:
    long = ask(page, "a video that is cancelled", ENDLESS)
    long.locator("img.preview").wait_for()
    waiting = ask(page, "a video that waits")
    has_status(waiting, "Queued: next")
    long.get_by_role("button", name="Cancel").click()
    has_status(long, "Cancelled")
    expect(long.get_by_role("button", name="Cancel")).to_have_count(0)
    has_status(waiting, "Made in")


def test_each_line_is_a_video_and_a_locked_seed_stays(page: Page) -> None:
    page.get_by_label("Seed", exact=True).fill("77")
    expect(page.get_by_role("button", name="Lock")).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Prompt", exact=True).fill("a first line\n\na second line")
    expect(page.locator("#prompt-count")).to_have_text("2 videos.")
    page.get_by_label("Steps", exact=True).first.fill("4")
    page.locator("#make-button").click()
    for prompt in ("a first line", "a second line"):
        has_status(card(page, prompt), "Made in")
        assert seed_of(card(page, prompt)) == "77"
    assert page.get_by_label("Seed", exact=True).input_value() == "77"
    page.get_by_role("button", name="Lock").click()
    unlocked = ask(page, "a third line")
    expect(unlocked).to_be_visible()
    assert seed_of(unlocked) == page.get_by_label("Seed", exact=True).input_value() != "77"


def test_same_again_has_another_seed(served: Served, page: Page) -> None:
    prompt = "a video that is made again"
    make(served, prompt, seed=5)
    card(page, prompt).get_by_role("button", name="Same again with another seed").click()
    expect(cards(page, prompt)).to_have_count(2)
    has_status(card(page, prompt), "Made in")
    assert seed_of(card(page, prompt)) != seed_of(cards(page, prompt).last) == "5"


def test_extend_and_use_last_frame_continue_a_video(served: Served, page: Page) -> None:
    prompt = "a red star rises on a white background"
    source = make(served, prompt, seed=5, num_inference_steps=12)
    frames = read_frames(file_of(served, source), 99)
    card(page, prompt).get_by_role("button", name="Extend").click()
    expect(cards(page, prompt)).to_have_count(2)
    expect(cards(page, prompt).last).to_contain_text("begins with the last 6 frames")
    has_status(card(page, prompt), "Made in")
    extended = read_frames(file_of(served, newest(served, prompt)), 99)
    assert difference(extended[:6], frames[-6:]) < 8

    cards(page, prompt).last.get_by_role("button", name="Use last frame").click()
    expect(page.locator("#conditions li")).to_contain_text(f"Last frame of “{prompt}”")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuenow", "0")
    has_status(ask(page, "a star that goes on", 12), "Made in")
    continued = read_frames(file_of(served, newest(served, "a star that goes on")), 99)
    assert difference(continued[:1], frames[-1:]) < 8 < difference(continued[:1], frames[:1])


@pytest.mark.slow
def test_a_grid_has_a_video_for_each_pair_of_two_settings(served: Served, page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a video of a grid")
    page.get_by_label("Steps", exact=True).first.fill("4")
    page.locator("#grid-panel summary").click()
    page.get_by_label("Values of the rows").fill("1, 3")
    page.get_by_label("Values of the columns").fill("7, 8")
    page.get_by_role("button", name="Make grid").click()
    grid = page.locator("#grid table")
    expect(grid.get_by_role("columnheader")).to_have_text(["guidance_scale × seed", "seed 7", "seed 8"])
    expect(grid.get_by_role("rowheader")).to_have_text(["guidance_scale 1", "guidance_scale 3"])
    expect(grid.locator("video")).to_have_count(4)
    videos = served.client.request("GET", "/v1/videos?limit=40&order=desc")["data"]
    made = [one["settings"] for one in videos if one["prompt"] == "a video of a grid"]
    assert len({(one.get("guidance_scale"), one["seed"]) for one in made}) == 4
    expect(cards(page, "a video of a grid")).to_have_count(4)


def test_a_grid_with_a_value_that_is_refused_makes_nothing(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("a video of no grid")
    page.locator("#grid-panel summary").click()
    page.get_by_label("Values of the rows").fill("1, -3")
    page.get_by_role("button", name="Make grid").click()
    error = page.locator("#grid-row-values ~ .error")
    expect(error).to_contain_text("guidance_scale = -3")
    expect(page.locator("#grid table")).to_have_count(0)
    expect(cards(page, "a video of no grid")).to_have_count(0)


def difference(frames: np.ndarray, others: np.ndarray) -> float:
    """Return the mean difference of frames in levels of 255."""
    return float(np.abs(frames.astype(float) - others).mean())


def test_an_error_stands_beside_its_field_in_the_servers_words(served: Served, page: Page) -> None:
    wrong = [("num_frames", "0"), ("guidance_scale", "-1"), ("prompt", ""), ("prompt", "x" * 100_000)]
    good = {"prompt": "a star", "num_frames": "25", "guidance_scale": "4"}
    page.get_by_label("Prompt", exact=True).fill(good["prompt"])
    for name, value in wrong:
        body = {"prompt": "a star", name: value if name == "prompt" else int(value)}
        with pytest.raises(UserError) as refused:
            served.client.request("POST", "/v1/videos", body)
        control, error = page.locator(f"[name={name}]"), page.locator(f"#error-{name}")
        control.fill(value)
        page.locator("#make-button").click()
        expect(error).to_have_text(str(refused.value))
        expect(control).to_have_attribute("aria-invalid", "true")
        expect(control).to_have_attribute("aria-describedby", re.compile(f"error-{name}"))
        expect(control).to_be_focused()
        expect(page.locator(".field").filter(has=control)).to_contain_text(str(refused.value))
        control.fill(good[name])
        expect(error).to_have_count(0)
        expect(control).not_to_have_attribute("aria-invalid", "true")


def test_a_broken_upload_is_told_and_a_whole_one_stands_on_the_timeline(
    served: Served, page: Page, tmp_path: Path
) -> None:
    clip = SmallVideos(tmp_path).make("clip.mp4")
    page.locator("#condition-file").set_input_files(
        {"name": "broken.mp4", "mimeType": "video/mp4", "buffer": clip.read_bytes()[:300]}
    )
    expect(page.locator("#condition-drop .error")).to_contain_text("broken.mp4: ")
    expect(page.locator("#conditions li")).to_have_count(0)

    drop_file(page.locator("#condition-drop"), clip.name, clip.read_bytes())
    expect(page.locator("#condition-drop .error")).to_have_count(0)
    expect(page.locator("#conditions li")).to_contain_text("clip.mp4, 3 frames")
    handle = page.get_by_role("slider", name="Start of clip.mp4")
    handle.press("ArrowRight")
    handle.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuenow", "2")
    expect(handle).to_be_focused()
    expect(page.get_by_label("At frame")).to_have_value("2")
    handle.press("End")
    expect(page.get_by_label("At frame")).to_have_value(re.compile(r"-\d+"))


# Gallery


def test_the_gallery_has_the_videos_and_gives_back_their_settings(served: Served, page: Page) -> None:
    prompts = [f"a {color} heart of the gallery" for color in ("green", "yellow", "purple")]
    videos = [make(served, prompt, seed=seed, shift=1.5) for seed, prompt in enumerate(prompts)]
    show(page, "Gallery")
    shown = page.locator("#gallery-items .prompt")
    expect(shown.first).to_have_text(prompts[-1])
    assert shown.all_inner_texts()[:3] == prompts[::-1]
    expect(page.locator("#gallery-items img").first).not_to_have_js_property("naturalWidth", 0)

    page.get_by_label("Search in prompts").fill("yellow heart")
    expect(shown).to_have_text([prompts[1]])
    page.get_by_role("button", name=prompts[1]).click()
    player = page.get_by_role("dialog", name=prompts[1])
    plays(player.locator("video"))
    expect(player).to_contain_text(str(videos[1]["file"]).rpartition("/")[2])
    player.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(prompts[1])
    expect(page.get_by_label("Seed", exact=True)).to_have_value("1")
    expect(page.get_by_label("Steps", exact=True).first).to_have_value("4")
    expect(page.locator("[name=shift]")).to_have_value("1.5")


def test_a_dropped_video_is_made_again_with_the_same_pixels(served: Served, page: Page) -> None:
    prompt = "a video that is reproduced"
    first = file_of(served, make(served, prompt, seed=9, num_inference_steps=6, guidance_scale=1.5))
    show(page, "Gallery")
    drop_file(page.locator("#view-gallery"), "found.mp4", first.read_bytes())
    found = page.locator("#inspection")
    expect(found).to_contain_text("Settings of found.mp4")
    for text in (prompt, "guidance_scale", "num_inference_steps"):
        expect(found.locator("dl")).to_contain_text(text)
    found.get_by_role("button", name="Reproduce").click()
    expect(cards(page, prompt)).to_have_count(2)
    has_status(card(page, prompt), "Made in")
    again = file_of(served, newest(served, prompt))
    assert again != first and (read_frames(again, 99) == read_frames(first, 99)).all()


def test_a_file_dropped_anywhere_is_inspected_and_the_form_stays(
    served: Served, page: Page, tmp_path: Path
) -> None:
    clip = SmallVideos(tmp_path).make("found.mp4", "a prompt of the file")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a prompt of the form")
    drop_file(prompt, clip.name, clip.read_bytes())
    expect(page.locator("#inspection")).to_contain_text("Settings of found.mp4")
    expect(page.locator("#inspection dl")).to_contain_text("a prompt of the file")
    expect(page.locator("#view-gallery")).to_be_visible()
    page.locator("#gallery-items button").first.click()
    drop_file(page.locator("#player"), "other.mp4", clip.read_bytes())
    expect(page.locator("#inspection")).to_contain_text("Settings of other.mp4")
    expect(page.locator("#player")).to_be_hidden()
    show(page, "Make")
    expect(prompt).to_have_value("a prompt of the form")
    drop_file(page.locator("#condition-drop"), clip.name, clip.read_bytes())
    expect(page.locator("#conditions li")).to_contain_text("found.mp4")
    expect(page.locator("#view-gallery")).to_be_hidden()


@pytest.mark.parametrize(("dragged", "is_taken"), [("file", True), ("text", False)])
def test_the_browser_opens_no_dropped_file_and_text_is_dragged_as_ever(
    page: Page, dragged: str, is_taken: bool
) -> None:
    prevented = page.evaluate(
        """(dragged) => {
            const dataTransfer = new DataTransfer();
            if (dragged === 'file') dataTransfer.items.add(new File(['x'], 'x.txt'));
            else dataTransfer.setData('text/plain', 'x');
            const options = { dataTransfer, bubbles: true, cancelable: true };
            const send = (name) => !document.body.dispatchEvent(new DragEvent(name, options));
            return [send('dragover'), send('drop')];
        }""",
        dragged,
    )
    assert prevented == [is_taken, is_taken]


def test_a_video_of_a_checkpoint_that_is_missing_is_not_made_again(page: Page, tmp_path: Path) -> None:
    lost = SmallVideos(tmp_path).make(
        "lost.mp4", "a lost video", checkpoint="lost-run", checkpoint_hash="xxh3:0123", checkpoint_step=7
    )
    show(page, "Gallery")
    page.locator("#inspect-file").set_input_files(lost)
    found = page.locator("#inspection")
    expect(found).to_contain_text("its checkpoint is not here: lost-run, step 7, weights xxh3:0123")
    expect(found.get_by_role("button", name="Reproduce")).to_be_disabled()
    page.locator("#inspect-file").set_input_files(
        {"name": "notes.mp4", "mimeType": "video/mp4", "buffer": b"no video"}
    )
    expect(page.locator("#inspect-drop .error")).to_contain_text("notes.mp4: holds no metadata of stdit")


def test_the_timeline_has_the_overlap_that_the_server_chooses(served: Served, page: Page) -> None:
    asked = {"prompt": "a ball", "segments": 2}
    estimate = served.client.request("POST", "/v1/estimate", asked)
    page.locator("#more-settings summary").click()
    page.locator("[name=segments]").fill("2")
    told = f"that share {estimate['overlap']}: {estimate['num_frames']} frames"
    expect(page.locator("#timeline")).to_contain_text(told)


# Runs


def test_a_run_is_shown_and_followed(served: Served, page: Page) -> None:
    run = served.folder / "outputs" / "shapes"
    show(page, "Runs")
    row = page.locator("[data-run=shapes]")
    expect(row).to_contain_text("stopped")
    expect(row).to_contain_text("200 of 400")
    loss = page.locator("figure, .plot").filter(has_text="Loss").first
    expect(loss.locator("polyline")).to_have_attribute("points", re.compile(r"(\S+\s+){20}"))
    expect(page.locator(".plot").filter(has_text="Learning rate")).to_be_visible()
    samples = page.get_by_role("region", name="Validation videos by step")
    expect(samples.locator("thead th")).to_have_text(["Prompt", "step 100", "step 200"])
    expect(samples.locator("video")).to_have_count(2)
    expect(page.get_by_role("region", name="Table of checkpoints")).to_contain_text("whole")
    drawn = str(loss.locator("polyline").get_attribute("points"))
    with locked(run):
        write_metrics(run, range(200, 250))
        expect(row).to_contain_text("running")
        expect(row).to_contain_text("250 of 400")
        expect(loss.locator("polyline")).not_to_have_attribute("points", drawn)


def test_a_finished_run_is_continued_to_more_steps(served: Served, page: Page) -> None:
    make_run(served.folder / "outputs" / "finished", steps=20, done=20)
    bodies: list[Any] = []

    def keep(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        route.continue_(post_data='{"steps": 20}')  # which the server refuses, so that nothing trains

    page.route("**/resume", keep)
    show(page, "Runs")
    page.get_by_role("button", name="Continue finished").click()
    dialog = page.locator("#confirmation")
    expect(dialog.get_by_label("Steps in all")).to_have_value("40")
    dialog.get_by_label("Steps in all").fill("50")
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator("#runs-error")).to_contain_text("give more steps")
    assert bodies == [{"steps": 50}]


@pytest.mark.slow
def test_a_plot_that_was_empty_is_drawn_at_once(page: Page) -> None:
    """No change of its size may follow, such as when its points come within a frame."""
    show(page, "Runs")
    lines = page.evaluate(
        """async () => {
            const { Plot } = await import('/static/plot.js');
            const plot = new Plot('Loss');
            document.querySelector('#view-runs').append(plot.element);
            plot.update([]);
            plot.update([{ name: 'a', points: [[0, 3, 2, 4], [1, 2, 1, 3]] }]);
            return plot.element.querySelectorAll('polyline').length;
        }"""
    )
    assert lines == 1


# Everywhere


def test_a_phone_never_scrolls_sideways(served: Served, browser: Browser, page: Page) -> None:
    phone = open_page(browser, served.client.url, viewport=PHONE, has_touch=True, is_mobile=True)
    prompt = "a video on a telephone " + "with a long prompt " * 8
    phone.locator("#more-settings summary").tap()
    phone.locator("[name=segments]").fill("3")
    phone.locator("[name=segments]").fill("1")
    one = ask(phone, prompt.strip())
    expect(one).to_be_in_viewport()
    has_status(one, "Made in")
    for view in VIEWS:
        show(phone, view)
        if view == "Runs":
            expect(phone.locator(".plot polyline").first).to_be_attached()
        if view == "Gallery":
            expect(phone.locator("#gallery-items li").first).to_be_visible()
        assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], view
    show(phone, "Make")
    phone.locator("#make-button").scroll_into_view_if_needed()
    expect(phone.locator("#make-button")).to_be_in_viewport(ratio=1)


def test_two_browsers_see_all_videos_and_one_may_be_closed(
    served: Served, browser: Browser, page: Page
) -> None:
    other = open_page(browser, served.client.url)
    first, second = "a video of one browser", "a video of another browser"
    ask(page, first, ENDLESS)
    for one in (page, other):
        card(one, first).locator("img.preview").wait_for()
        has_status(card(one, first), "Step")
    card(other, first).get_by_role("button", name="Cancel").click()
    has_status(card(page, first), "Cancelled")
    ask(other, second, 100)
    for one in (page, other):
        card(one, second).locator("img.preview").wait_for()
    other.context.close()
    has_status(card(page, second), "Made in")
    show(page, "Gallery")
    expect(page.get_by_role("button", name=second)).to_be_visible()


def test_no_view_has_a_serious_problem_of_accessibility(served: Served, page: Page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check(view: str) -> None:
        for scheme, options in (("light", None), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=scheme)
            found = axe.run(page, options=options).response["violations"]
            serious = [one for one in found if one["impact"] in ("serious", "critical")]
            told = [(one["id"], one["help"], [node["target"] for node in one["nodes"]]) for one in serious]
            assert told == [], f"{view}, {scheme}: {told}"

    make(served, "a video that is looked at")
    ask(page, "a video that forms", ENDLESS).locator("img.preview").wait_for()
    page.locator("[name=num_frames]").fill("0")
    expect(page.locator("#error-num_frames")).to_be_visible()
    check("make")
    show(page, "Runs")
    expect(page.locator(".plot polyline").first).to_be_attached()
    check("runs")
    show(page, "Gallery")
    page.locator("#gallery-items button").first.click()
    expect(page.locator("#player .inspection")).to_be_visible()
    check("player")
    page.get_by_role("button", name="Close").click()
    check("gallery")


@pytest.mark.slow
def test_everything_is_reached_by_the_keyboard(served: Served, page: Page) -> None:
    prompt = "a video made without a mouse"
    tab_to(page, "prompt")
    page.keyboard.type(prompt)
    tab_to(page, "num_inference_steps")
    page.keyboard.type(str(ENDLESS))
    tab_to(page, "make-button")
    page.keyboard.press("Enter")
    card(page, prompt).locator("img.preview").wait_for()
    tab_to(page, "Cancel")
    page.keyboard.press("Enter")
    has_status(card(page, prompt), "Cancelled")
    make(served, prompt)
    has_status(card(page, prompt), "Made in")
    page.locator("#make-button").focus()
    for name in ("Download", "Same again with another seed", "Extend", "Use last frame"):
        tab_to(page, name)


@pytest.mark.slow
def test_clicks_are_answered_while_a_video_is_made(page: Page) -> None:
    """Prints how fast; other work of the machine counts, so that this is for a person to judge."""
    ask(page, "a video in the background", ENDLESS).locator("img.preview").wait_for()
    found = milliseconds_of_clicks(page, CLICKS, 60)
    has_status(card(page, "a video in the background"), "Step")
    p50, p95 = statistics.median(found), statistics.quantiles(found, n=20)[-1]
    print(f"{len(found)} clicks while a video is made: p50 {p50:.0f} ms, p95 {p95:.0f} ms")
