"""Serving a page, on this machine unless asked otherwise."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

import gradio as gr

from apps.image_app import ImageApp
from apps.loading import load_pipeline, model_name
from apps.studio import Studio
from apps.video_app import VideoApp
from diffnext.pipelines.model_card import Defaults, Ranges, read_defaults
from diffnext.utils.folders import find_folder

__all__ = ["serve"]

MAX_WAITING = 20
MAX_UPLOAD = "20mb"
CSS = """
.gradio-container { max-width: 1366px !important; margin: 0 auto !important; }
#header { text-align: center; }
.result .image-frame, .result img { width: 100%; height: 100%; object-fit: contain; }
"""


def serve(
    app_class: type[ImageApp] | type[VideoApp],
    defaults: Defaults,
    ranges: Ranges,
    args: argparse.Namespace,
) -> int:
    """Load the model and serve the page until the process is told to end.

    Args:
        app_class: Which app.
        defaults: Of the page, where the model's card says nothing.
        ranges: Of its sliders.
        args: The command line, see :func:`apps.options.parse_args`.

    Returns:
        The exit code: 1 if the model cannot be used or the port is taken.
    """
    # What gradio copies and what the studio writes are in one folder, which ends with the process.
    with tempfile.TemporaryDirectory(prefix="nova-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        # Told to end, gradio closes the server, as it does for Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            folder = find_folder(args.model)
            defaults = read_defaults(folder, defaults, ranges)
            pipe = load_pipeline(folder, args.device, args.precision)
            studio = Studio(pipe, model_name(args.model), Path(cache))
            run(app_class(studio, defaults).build_page(), args.host, args.port)
            studio.close()  # a thread at work when Python ends would bring the process down
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def run(page: gr.Blocks, host: str, port: int | None) -> None:
    """Serve a page until the process is told to end.

    It has a queue, no public link, and no access to files but its own.

    Args:
        page: The page.
        host: Address to listen on.
        port: To listen on; None is the first free one from 7860 on.

    Raises:
        OSError: If the port is taken.
    """
    page.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=1)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme="origin",
        css=CSS,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"Open {url}", flush=True)
    page.block_thread()
