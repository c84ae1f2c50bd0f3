"""The apps in a browser: Chromium without a window, against the scripts as a user runs them.

CHROMIUM names the browser where it is not found by itself. AXE names the file axe.min.js of the
npm package axe-core; without it, accessibility is not checked. To renew the pictures of the guide:

    APP_SCREENSHOTS=docs pytest -m slow tests/scripts/test_apps_browser.py
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import ExifTags, Image

from diffnext.cli import init
from diffnext.utils import read_parameters
from shapes_world.detection import detect

pytest.importorskip("gradio", reason="the apps need `pip install .[demo]`")
sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is here"),
]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400  # for a start or a drawing on a machine that is busy with other things
PATIENCE = 1000 * SECONDS
DESKTOP, PHONE = (1280, 960), (390, 844)
COUNT_SHIFTS = """
window.shifts = 0;
new PerformanceObserver((list) => list.getEntries().forEach((one) => {
  window.shifts += one.value;
})).observe({type: "layout-shift", buffered: true});
"""
RANDOM_MODEL = "random-weights"
SHIPPED_MODEL = ROOT / "assets" / "nova-tiny-video"


@contextmanager
def serve(script, *words):
    """The address of a running app."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, ROOT / "scripts" / script, "--port", str(port), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder},
            )
        try:
            wait_for(lambda: "Open http" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield re.search(r"Open (http://127.0.0.1:\d+/)", log.read_text())[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0, log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()
            assert not list(Path(folder).glob("nova-app-*")), "files were left behind"
        finally:
            process.kill()


def wait_for(condition):
    """Wait until something is so, and return it."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing came in {SECONDS} s"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def image_url():
    with serve("app_nova_t2i.py") as url:
        yield url


@pytest.fixture(scope="module")
def video_url(tmp_path_factory):
    """A model with random weights that is large enough to be stopped."""
    folder = tmp_path_factory.mktemp("models")
    config = OmegaConf.load(ROOT / "configs" / "nova_shapes_t2v.yaml")
    config.pipeline.paths.module_config.transformer.update(
        {"image_size": [256, 256], "image_base_size": [16, 16], "video_base_size": [5, 8, 8]}
    )
    OmegaConf.save(config, folder / "config.yaml")
    words = ["--config", str(folder / "config.yaml"), "--output", str(folder / RANDOM_MODEL)]
    assert init.main([*words, "--tiny"]) == 0
    with serve("app_nova_t2v.py", "--model", str(folder / RANDOM_MODEL)) as url:
        yield url


@pytest.fixture(scope="module")
def shipped_url():
    with serve("app_nova_t2v.py") as url:
        yield url


@pytest.fixture
def open_page(browser):
    """Opens an app as a new visitor; requests that leave this machine are kept."""
    contexts = []

    def open_as_new_visitor(url, size=DESKTOP, scheme="light"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.foreign = []
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "data:")) else page.foreign.append(request.url)
            ),
        )
        page.add_init_script(COUNT_SHIFTS)
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.wait_for_selector("#generate")
        return page

    yield open_as_new_visitor
    for context in contexts:
        context.close()


def set_number(page, elem_id, value):
    """Type a value beside a slider."""
    box = page.locator(f"#{elem_id} input[type=number]")
    box.fill(str(value))
    box.blur()


def draw(page, prompt=None):
    """Ask for a prompt, and wait until it is drawn."""
    if prompt is not None:
        page.fill("#prompt textarea", prompt)
    before = page.locator("#drawn li").count()
    page.click("#generate")
    wait_for(lambda: page.locator("#drawn li").count() > before)
    wait_for(lambda: "Done." in status(page))


def drawn_file(page, folder, number=1):
    """A result, as its link saves it."""
    with page.expect_download() as download:
        page.click(f"#result{number} a[download]")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def read_picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def status(page):
    """What is written over the results: progress, the place in the queue, or the end."""
    return page.locator("#status").inner_text()


def save_screenshot(page, name, whole=True):
    """A picture for the guide, where it is asked for; of 128 colours, to stay small."""
    folder = os.environ.get("APP_SCREENSHOTS")
    if folder is not None:
        picture = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
        picture.quantize(128).save(Path(folder) / name, optimize=True)


# --- pictures -------------------------------------------------------------------------------


def test_a_prompt_becomes_pictures(image_url, open_page, tmp_path):
    page = open_page(image_url)
    draw(page, "a green square")
    seed = int(page.locator("#seed input[type=number]").input_value())
    found = []
    for index in range(4):
        file = drawn_file(page, tmp_path, index + 1)
        parameters = read_parameters(file)
        assert parameters["prompt"] == "a green square" and parameters["seed"] == seed + index
        assert parameters["guidance_scale"] == 2.5 and parameters["num_inference_steps"] == 16
        found.append([(item.color, item.shape) for item in detect(read_picture(file)).items])
        picture = page.locator(f"#result{index + 1} img")
        assert picture.get_attribute("alt") == f"a green square (seed {seed + index})"
        assert picture.evaluate("(image) => image.naturalWidth") == 64
    assert [("green", "square")] in found
    shown = page.locator("#result1 img").bounding_box()
    assert min(shown["width"], shown["height"]) > 200  # pictures of 64 pixels are enlarged
    assert page.foreign == []
    save_screenshot(page, "app_t2i.png")


def test_enter_draws_and_settings_of_a_result_are_used_again(image_url, open_page, tmp_path):
    page = open_page(image_url)
    page.uncheck("#randomize-seed input")
    set_number(page, "seed", 5)
    page.fill("#prompt textarea", "a blue cross")
    page.press("#prompt textarea", "Enter")
    wait_for(lambda: "Done." in status(page))
    assert page.locator("#prompt textarea").input_value() == "a blue cross"  # without a new line
    first = read_picture(drawn_file(page, tmp_path))

    page.check("#randomize-seed input")
    set_number(page, "inference-steps", 4)
    page.fill("#prompt textarea", "a red ring")
    page.press("#negative-prompt textarea", "Shift+Enter")
    wait_for(lambda: page.locator("#drawn li").count() == 8)
    wait_for(lambda: "Done." in status(page))
    page.get_by_role("button", name="Use settings of a blue cross (seed 5)").click()
    wait_for(lambda: page.locator("#prompt textarea").input_value() == "a blue cross")
    assert page.locator("#seed input[type=number]").input_value() == "5"
    assert page.locator("#inference-steps input[type=number]").input_value() == "16"
    assert not page.locator("#randomize-seed input").is_checked()
    draw(page)
    assert np.array_equal(read_picture(drawn_file(page, tmp_path)), first)


def test_pictures_emerge_and_stay_when_stopped(image_url, open_page, tmp_path):
    page = open_page(image_url)
    set_number(page, "inference-steps", 64)
    set_number(page, "diffusion-steps", 50)
    assert page.locator("#stop").is_disabled()
    page.click("#generate")
    wait_for(lambda: page.locator("#result4 img[src^='data:']").count())
    assert re.match(r"Set \d+ of \d+", status(page))
    page.click("#stop")
    wait_for(lambda: "Grey parts are not drawn yet" in status(page))
    assert read_parameters(drawn_file(page, tmp_path))["stopped_after_sets"] > 0
    assert page.locator("#drawn li").count() == 4
    assert page.locator("#stop").is_disabled()


def test_the_length_of_a_prompt_is_told(image_url, open_page):
    page = open_page(image_url)
    length = page.locator(".length").first
    page.get_by_role("button", name="two cyan stars").click()  # an example
    wait_for(lambda: page.locator("#prompt textarea").input_value() == "two cyan stars")
    wait_for(lambda: length.inner_text() == "3 of 24 tokens")
    page.fill("#prompt textarea", "a star " * 30)
    wait_for(lambda: "The prompt has 61 tokens, the model reads 24" in length.inner_text())
    assert page.locator("#prompt textarea").input_value() == "a star " * 30  # not cut
    page.click("#generate")
    wait_for(lambda: "The prompt has 61 tokens" in status(page))
    page.fill("#prompt textarea", "")
    page.click("#generate")
    wait_for(lambda: status(page) == "The prompt is empty.")


def test_other_files_are_not_served(image_url):
    for path in ("/etc/hostname", ROOT / "README.md", ROOT / "assets/nova-tiny/model_index.json"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{image_url}gradio_api/file={path}", timeout=60)
        assert refused.value.code in (403, 404)


def test_the_page_alone_can_draw(image_url):
    request = urllib.request.Request(
        f"{image_url}gradio_api/run/generate",
        data=b'{"data": ["a", "", 0, false, 5, 4, 4]}',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code in (401, 403, 404)


# --- videos -----------------------------------------------------------------------------------


def make_image_prompt(path):
    """A picture with transparency that is stored lying on its side."""
    array = np.zeros((120, 160, 4), np.uint8)
    array[..., 3] = 255
    array[:, :80] = (220, 40, 40, 255)
    array[:, 80:, 3] = 0
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(array, "RGBA").save(path, exif=exif)


def test_a_prompt_and_a_picture_become_a_video(video_url, open_page, tmp_path):
    page = open_page(video_url)
    page.get_by_text("Advanced Options").click()
    set_number(page, "inference-steps", 4)
    set_number(page, "diffusion-steps", 5)
    (tmp_path / "damaged.png").write_text("no picture")
    page.set_input_files("#image-prompt input[type=file]", tmp_path / "damaged.png")
    page.get_by_text("This file cannot be used: it is not a picture in a known format").wait_for()
    make_image_prompt(tmp_path / "prompt.png")
    page.set_input_files("#image-prompt input[type=file]", tmp_path / "prompt.png")
    page.wait_for_selector("#image-prompt img")
    draw(page, "a red square moving left")
    file = drawn_file(page, tmp_path)
    frames = imageio.imread(file)
    assert frames.shape == (17, 256, 256, 3)
    # Upright, red is above; what was transparent is white.
    assert frames[0, :100, :, 0].mean() > 130 > frames[0, :100, :, 1].mean()
    assert frames[0, 160:].mean() > 170
    parameters = read_parameters(file)
    assert parameters["prompt"] == "a red square moving left"
    assert parameters["max_latent_length"] == 5 and parameters["model"] == RANDOM_MODEL
    assert len(parameters["image_sha256"]) == 64
    assert page.foreign == []


def test_a_second_visitor_waits_and_stopping_lets_them_in(video_url, open_page):
    first, second = open_page(video_url), open_page(video_url)
    for page in (first, second):
        page.fill("#prompt textarea", "a ring")
    first.click("#generate")  # as for a released model: 128 sets of 100 steps a frame
    wait_for(lambda: re.search(r"Set \d+ of", status(first)))
    second.click("#generate")
    wait_for(lambda: "You are number 2 in the queue." in status(second))

    # In the queue: the visitor leaves it, and the drawing in progress goes on.
    second.click("#stop")
    wait_for(lambda: "You left the queue" in status(second))
    assert "Set" in status(first)
    second.click("#generate")
    wait_for(lambda: "You are number 2 in the queue." in status(second))

    # In progress: it ends long before its time, and the next visitor's turn has come.
    first.click("#stop")
    wait_for(lambda: "Stopped after set" in status(first))
    assert first.locator("#result1 video[src]").count() == 1
    wait_for(lambda: re.search(r"Set \d+ of", status(second)))
    second.context.close()  # so does who leaves
    first.get_by_text("Advanced Options").click()
    set_number(first, "inference-steps", 4)
    set_number(first, "diffusion-steps", 5)
    draw(first)

    # The app, which is told to end now, has to end in the middle of a drawing: see serve().
    set_number(first, "inference-steps", 128)
    first.click("#generate")
    wait_for(lambda: re.search(r"Set \d+ of", status(first)))


def test_the_model_that_comes_with_the_code_makes_a_video(shipped_url, open_page, tmp_path):
    page = open_page(shipped_url, PHONE)
    draw(page, "a blue circle moving right")
    file = drawn_file(page, tmp_path)
    assert read_parameters(file)["model"] == SHIPPED_MODEL.name
    assert len(imageio.imread(file)) == 17
    save_screenshot(page, "app_t2v.png", whole=False)


# --- both, on screens of several sizes --------------------------------------------------------


@pytest.fixture(params=["image_url", "shipped_url"])
def url(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_nothing_jumps_and_all_fits(url, open_page, size, scheme):
    page = open_page(url, size, scheme)
    button = page.locator("#generate").bounding_box()
    assert button["y"] + button["height"] <= size[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.wait_for_timeout(1000)
    page.evaluate("window.shifts = 0")
    draw(page, "a red ring")
    result = page.locator("#result1").bounding_box()
    assert result["y"] < size[1] - 100  # seen without scrolling
    assert page.locator("#generate").bounding_box() == button
    assert page.evaluate("window.shifts") < 0.01


@pytest.mark.skipif("AXE" not in os.environ, reason="AXE does not name an axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_are_accessible(url, open_page, size, scheme):
    page = open_page(url, size, scheme)
    draw(page, "a red ring")
    page.get_by_text("Advanced Options").scroll_into_view_if_needed()
    page.add_script_tag(path=os.environ["AXE"])
    found = page.evaluate("axe.run()")["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, [
        (one["id"], node["html"], node["failureSummary"])
        for one in serious
        for node in one["nodes"]
    ]
