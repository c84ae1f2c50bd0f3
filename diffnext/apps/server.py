"""Serving a page, on this machine unless asked otherwise."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

import gradio as gr

from diffnext.apps.page import Page
from diffnext.apps.pictures import PicturePage
from diffnext.apps.studio import Studio
from diffnext.apps.videos import VideoPage
from diffnext.cli.generate import load_pipeline
from diffnext.pipelines.model_card import read_defaults
from diffnext.utils.device_utils import get_device
from diffnext.utils.folders import find_folder, newest_checkpoint, public_name

__all__ = ["serve"]

PAGES: dict[str, type[Page]] = {"image": PicturePage, "video": VideoPage}
STYLE = Path(__file__).with_name("page.css")


def serve(args: argparse.Namespace) -> int:
    """Load the model and serve the page until the process is told to end.

    Args:
        args: The command line, see :mod:`diffnext.cli.app`.

    Returns:
        The exit code: 1 if the model cannot be used or the port is taken.
    """
    page_class = PAGES[args.kind]
    # What gradio copies and what the page writes are in one folder, which ends with the process.
    with tempfile.TemporaryDirectory(prefix="nova-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        # Told to end, gradio closes the server, as it does for Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            folder = newest_checkpoint(find_folder(args.model))
            defaults = read_defaults(folder, page_class.DEFAULTS, page_class.RANGES)
            args.device = str(get_device(args.device))
            studio = Studio(load_pipeline(folder, args), public_name(args.model))
            run(page_class(studio, defaults, Path(cache)).blocks, args.host, args.port)
            studio.close()  # a thread at work when Python ends would bring the process down
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def run(page: gr.Blocks, host: str, port: int | None) -> None:
    """Serve a page until the process is told to end.

    It has no public link, and no access to files but its own.

    Args:
        page: The page.
        host: Address to listen on.
        port: To listen on; None is the first free one from 7860 on.

    Raises:
        OSError: If the port is taken.
    """
    page.queue(api_open=False)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme="origin",
        css_paths=STYLE,
        max_file_size="20mb",
        allowed_paths=[],
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"Open {url}", flush=True)
    page.block_thread()
