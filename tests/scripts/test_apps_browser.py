"""The apps in a browser: Chromium without a window, against the scripts as a user runs them.

CHROMIUM names the browser where it is not found by itself. To renew the pictures of the guide:

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
            assert process.wait(60) == 0, log.read_text()
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


@pytest.fixture
def open_page(browser):
    """Opens an app as a new visitor; requests that leave this machine are kept."""
    contexts = []

    def open_as_new_visitor(url):
        context = browser.new_context(viewport={"width": 1280, "height": 960})
        contexts.append(context)
        page = context.new_page()
        page.foreign = []
        page.on(
            "request",
            lambda request: None if request.url.startswith(url) else page.foreign.append(request),
        )
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


def result_source(page, tag="img", other_than=None):
    """Address of the first result, once it is there and another than before."""

    def find():
        found = page.locator(f"#result1 {tag}[src]")
        source = found.get_attribute("src") if found.count() else None
        return source if source and source != other_than else None

    return wait_for(find)


def download(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def read_picture(url):
    return np.asarray(Image.open(io.BytesIO(download(url))).convert("RGB"))


def status(page):
    """What is written over the first result: progress, or the place in the queue."""
    return page.locator("#result1").inner_text()


def save_screenshot(page, name):
    """A picture for the guide, where it is asked for; of 128 colours, to stay small."""
    folder = os.environ.get("APP_SCREENSHOTS")
    if folder is not None:
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.quantize(128).save(Path(folder) / name, optimize=True)


def test_a_prompt_becomes_pictures(image_url, open_page, tmp_path):
    page = open_page(image_url)
    page.fill("#prompt textarea", "a green square")
    page.click("#generate")
    result_source(page)
    sources = [page.locator(f"#result{n} img").get_attribute("src") for n in (1, 2, 3, 4)]
    seed = int(page.locator("#seed input[type=number]").input_value())
    found = []
    for index, source in enumerate(sources):
        file = tmp_path / f"{index}.webp"
        file.write_bytes(download(source))
        parameters = read_parameters(file)
        assert parameters["prompt"] == "a green square" and parameters["seed"] == seed + index
        assert parameters["guidance_scale"] == 2.5 and parameters["num_inference_steps"] == 16
        found.append([(item.color, item.shape) for item in detect(read_picture(source)).items])
    assert [("green", "square")] in found
    shown = page.locator("#result1 img").bounding_box()
    assert min(shown["width"], shown["height"]) > 200  # pictures of 64 pixels are enlarged
    assert page.foreign == []
    save_screenshot(page, "app_t2i.png")


def test_enter_draws_and_the_same_seed_draws_the_same(image_url, open_page):
    page = open_page(image_url)
    page.uncheck("#randomize-seed input")
    set_number(page, "seed", 5)
    page.fill("#prompt textarea", "a blue cross")
    page.press("#prompt textarea", "Enter")
    first = result_source(page)
    assert page.locator("#prompt textarea").input_value() == "a blue cross"  # without a new line
    page.press("#negative-prompt textarea", "Enter")
    second = result_source(page, other_than=first)
    assert np.array_equal(read_picture(first), read_picture(second))
    assert page.locator("#seed input[type=number]").input_value() == "5"


def test_an_example_fills_the_prompt(image_url, open_page):
    page = open_page(image_url)
    page.get_by_role("button", name="two cyan stars").click()
    wait_for(lambda: page.locator("#prompt textarea").input_value() == "two cyan stars")


def test_mistakes_are_explained(image_url, open_page):
    page = open_page(image_url)
    page.fill("#prompt textarea", "")
    page.click("#generate")
    page.get_by_text("The prompt is empty.").wait_for()


def test_other_files_are_not_served(image_url):
    for path in ("/etc/hostname", ROOT / "README.md", ROOT / "assets/nova-tiny/model_index.json"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            download(f"{image_url}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_nobody_passes_the_queue(image_url):
    request = urllib.request.Request(
        f"{image_url}gradio_api/run/generate_image4",
        data=b'{"data": ["a", "", 0, false, 5, 4, 4]}',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code in (401, 403, 404)


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
    make_image_prompt(tmp_path / "prompt.png")
    page.set_input_files("#image-prompt input[type=file]", tmp_path / "prompt.png")
    page.wait_for_selector("#image-prompt img")
    page.fill("#prompt textarea", "a red square moving left")
    page.press("#prompt textarea", "Enter")
    file = tmp_path / "clip.mp4"
    file.write_bytes(download(result_source(page, "video")))
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
    save_screenshot(page, "app_t2v.png")


def test_a_second_visitor_waits_and_stopping_lets_them_in(video_url, open_page):
    first, second = open_page(video_url), open_page(video_url)
    first.click("#generate")  # as for a released model: 128 sets of 100 steps a frame
    wait_for(lambda: re.search(r"\d+/\d+ sets", status(first)))
    second.click("#generate")
    wait_for(lambda: "queue: 1/1" in status(second))
    assert "sets" in status(first)

    # In the queue: the visitor leaves it, and the drawing in progress goes on.
    second.click("#stop")
    wait_for(lambda: status(second).strip() == "")
    assert "sets" in status(first)
    second.click("#generate")
    wait_for(lambda: "queue: 1/1" in status(second))

    # In progress: it ends long before its time, and the next visitor's turn has come.
    first.click("#stop")
    wait_for(lambda: re.search(r"\d+/\d+ sets", status(second)))
    assert status(first).strip() == ""
    assert first.locator("#result1 video[src]").count() == 0
    second.click("#stop")
    wait_for(lambda: status(second).strip() == "")

    # Nothing is left of the interruption.
    for elem_id, value in (("inference-steps", 4), ("diffusion-steps", 5)):
        if not first.locator(f"#{elem_id}").is_visible():
            first.get_by_text("Advanced Options").click()
        set_number(first, elem_id, value)
    first.click("#generate")
    result_source(first, "video")

    # The app, which is told to end now, has to end in the middle of a drawing: see serve().
    second.click("#generate")
    wait_for(lambda: re.search(r"\d+/\d+ sets", status(second)))


def test_the_model_that_comes_with_the_code_makes_a_video(open_page, tmp_path):
    with serve("app_nova_t2v.py") as url:
        page = open_page(url)
        page.fill("#prompt textarea", "a blue circle moving right")
        page.click("#generate")
        file = tmp_path / "clip.mp4"
        file.write_bytes(download(result_source(page, "video")))
        assert read_parameters(file)["model"] == SHIPPED_MODEL.name
        assert len(imageio.imread(file)) == 17
        save_screenshot(page, "app_t2v.png")
