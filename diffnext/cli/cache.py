"""The command line that builds record datasets of latents."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffnext.cli.parsing import command_parser

if TYPE_CHECKING:  # both import torch, which --help does not need
    from diffnext.data.caching.building import CacheReport
    from diffnext.data.caching.settings import CacheSettings

DESCRIPTION = """\
Turn pictures or clips with captions into a record dataset of latents, to train on.

  diffnext cache images photos --output img_dataset --vae nova/vae --size 1024
  diffnext cache videos clips --output vid_dataset --vae nova/vae --size 480x768

SOURCE is a folder of media files with captions beside them (cat.jpg and cat.txt, or cat.json with
"caption" and "text"), a glob pattern in quotes, a table (CSV, JSON lines, Parquet) with columns of
files and captions, a folder with a metadata.csv or metadata.jsonl, a folder that the Hugging Face
library datasets saved, or uncompressed WebDataset tar files.

The same command continues a build that was killed, with nothing lost but the current chunk. What
cannot be used is left out and listed, with the reason, in OUTPUT/skipped.jsonl.
"""
EPILOG = """\
several sizes, each example to the one of the nearest shape; a dataset each in OUTPUT/768x1344 ...:
  diffnext cache images photos --output data --vae nova/vae --buckets 1024
  diffnext cache images photos --output data --vae nova/vae --size 1024 768x1344 1344x768

from a table, relative to the table's folder:
  diffnext cache images list.csv --output data --vae nova/vae --size 1024 --caption-column prompt

on all GPUs of the machine, or on several machines that see the same folders (the same command on
each; they share the work, and take over what a machine leaves that goes down):
  accelerate launch -m diffnext cache images photos --output data --vae nova/vae --size 1024

after pictures or captions were changed, added or removed:
  diffnext cache images photos --output data --vae nova/vae --size 1024 --update

exit codes: 0 built, 1 an error (the last line says which), 2 a wrong command line, 130 interrupted
"""
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code.
    """
    args = build_parser().parse_args(argv)
    from diffnext.data.caching.errors import CacheError
    from diffnext.data.records import RecordError

    try:
        return _run(args)
    except (CacheError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext cache", DESCRIPTION, EPILOG)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="images|videos")
    for kind in ("images", "videos"):
        command = kinds.add_parser(
            kind,
            help=f"build a dataset of {kind}",
            description=DESCRIPTION,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("source", help="folder, glob pattern, table or archive")
        _add_main_options(command)
        _add_source_options(command)
        _add_size_options(command)
        if kind == "videos":
            _add_video_options(command)
        _add_caption_options(command)
        _add_work_options(command, kind)
    return parser


def _add_main_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--vae", type=Path, required=True, help="folder of the autoencoder, or one with vae/ in it"
    )
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--size",
        nargs="+",
        metavar="SIZE",
        help="SIDE or HEIGHTxWIDTH in pixels; of several the nearest aspect is taken",
    )
    sizes.add_argument(
        "--buckets",
        type=int,
        metavar="SIDE",
        help="sizes of about SIDE x SIDE pixels and aspects from 1:2 to 2:1 in place of --size",
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    from diffnext.data.caching.settings import FORMATS

    group = parser.add_argument_group("source")
    group.add_argument(
        "--format", choices=FORMATS, default="auto", help="kind of the source (by its name)"
    )
    group.add_argument("--split", help="of a Hugging Face dataset, such as train")
    group.add_argument("--root", type=Path, help="where a table's paths begin (the table's folder)")
    for name, what in {
        "media": "files, or their bytes",
        "caption": "long captions",
        "text": "short captions",
        "label": "classes",
        "flow": "motion strengths",
    }.items():
        group.add_argument(f"--{name}-column", metavar="NAME", help=f"column of {what}")


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--resize",
        choices=("cover", "stretch"),
        default="cover",
        help="scale to cover the size and cut the middle out, or distort (cover)",
    )
    group.add_argument(
        "--max-upscale",
        type=float,
        default=4.0,
        metavar="X",
        help="leave out what would have to be enlarged more than X times (4)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=2**27,
        metavar="N",
        help="leave out pictures of more pixels, unread (134217728)",
    )
    group.add_argument(
        "--flip",
        action="store_true",
        help="a mirrored copy after each example, unless its captions say left or right",
    )


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clips")
    group.add_argument("--num-frames", type=int, default=33, help="frames of a clip (33)")
    group.add_argument(
        "--stride", type=int, default=2, help="frames of the video from one to the next (2)"
    )
    group.add_argument("--fps", type=float, help="frames per second, in place of --stride")
    group.add_argument(
        "--clips", type=int, default=1, help="clips of a video at most, one after the other (1)"
    )
    group.add_argument(
        "--short",
        choices=("skip", "hold"),
        default="skip",
        help="leave out videos that are too short, or hold their last frame (skip)",
    )
    group.add_argument(
        "--flow",
        default="auto",
        metavar="X",
        help="motion strength of clips without one in the table or side file; auto measures how "
        "many pixels, at 480 pixels height, what moves does move from frame to frame (auto)",
    )
    group.add_argument(
        "--decoder", choices=("pyav", "decord"), default="pyav", help="what reads videos (pyav)"
    )


def _add_caption_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--labels", action="store_true", help="store the label, a whole number, and no caption"
    )
    group.add_argument(
        "--empty-captions", action="store_true", help="keep examples that have no caption"
    )
    group.add_argument(
        "--max-caption",
        type=int,
        default=10_000,
        metavar="N",
        help="leave out examples with captions of more characters (10000)",
    )
    group.add_argument(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="store text states in place of captions: a release folder with text_encoder/ and "
        "tokenizer/",
    )
    group.add_argument(
        "--text-length", type=int, default=256, metavar="N", help="tokens encoded at most (256)"
    )


def _add_work_options(parser: argparse.ArgumentParser, kind: str) -> None:
    from diffnext.data.caching.settings import USUAL_BATCH_SIZES

    group = parser.add_argument_group("work")
    group.add_argument(
        "--batch-size",
        type=int,
        default=USUAL_BATCH_SIZES[kind],
        metavar="N",
        help="examples encoded at once (8 pictures, 1 clip)",
    )
    group.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="to compute in (float16 on a GPU, float32 on a CPU); stored are float16",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:1 (a GPU if there is one)")
    group.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="threads that decode (one per core, at most 8)",
    )
    group.add_argument(
        "--chunk-size",
        type=int,
        metavar="N",
        help="files that a kill costs at most (8 videos, or 64 pictures for each size)",
    )
    group.add_argument(
        "--shard-size", type=int, default=8192, metavar="N", help="examples to a shard (8192)"
    )
    group.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="list what cannot be used and go on, or stop at the first (skip)",
    )
    group.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="leave out files that take longer to decode (120)",
    )
    group.add_argument(
        "--update",
        action="store_true",
        help="read what changed in the source since the last build, and keep the rest",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace) -> int:
    from diffnext.data.caching.building import build_cache

    settings = make_settings(args, args.device or _choose_device())
    is_main = os.environ.get("RANK", "0") == "0"
    is_silent = args.quiet or not is_main
    with _Progress(is_silent, args.kind) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # skipped.jsonl tells what is wrong
        report = build_cache(settings, progress)
    if is_main:
        _print_report(report, settings)
    return 0


def make_settings(args: argparse.Namespace, device: str) -> CacheSettings:
    """The settings that a command line asks for.

    Raises:
        CacheError: If they are impossible.
    """
    from diffnext.data.caching.settings import CacheSettings, Columns, FrameSampling

    values: dict[str, Any] = {}
    if args.kind == "videos":
        values["frames"] = FrameSampling(
            num_frames=args.num_frames,
            stride=args.stride,
            fps=args.fps,
            clips=args.clips,
            short=args.short,
        )
        values["flow"] = _parse_flow(args.flow)
        values["decoder"] = args.decoder
    sizes = _choose_sizes(args)
    chunk_size = args.chunk_size
    if chunk_size is None:  # at the end of a chunk, the last batch of each size is filled up
        chunk_size = 8 if args.kind == "videos" else 64 * len(sizes)
    columns = ("media", "caption", "text", "label", "flow")
    same = (
        "kind source output vae format split root resize max_upscale max_pixels flip labels "
        "empty_captions max_caption text_encoder text_length batch_size workers shard_size "
        "on_error time_limit update"
    ).split()
    return CacheSettings(
        **{name: getattr(args, name) for name in same},
        **values,
        sizes=sizes,
        chunk_size=chunk_size,
        columns=Columns(**{name: getattr(args, f"{name}_column") for name in columns}),
        dtype=args.dtype or ("float32" if device == "cpu" else "float16"),
        device=device,
    )


def _choose_sizes(args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    from diffnext.data.caching.geometry import bucket_sizes
    from diffnext.data.caching.settings import parse_size

    if args.size is None:
        return bucket_sizes(args.buckets)
    return tuple(parse_size(size) for size in args.size)


def _parse_flow(text: str) -> float | None:
    from diffnext.data.caching.errors import CacheError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise CacheError(f"--flow must be a number or auto, got {text!r}") from None


def _choose_device() -> str:
    """A GPU if there is one; each process of a launcher its own."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return f"{kind}:{int(os.environ.get('LOCAL_RANK', 0)) % torch.accelerator.device_count()}"


class _Progress:
    """A bar with the time that is left; it knows its length from the first call.

    Args:
        silent: Whether to show nothing.
        unit: What is counted.
    """

    def __init__(self, silent: bool, unit: str) -> None:
        self._silent = silent
        self._unit = unit
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Show how far the build is."""
        from tqdm import tqdm

        if self._bar is None:
            # What an earlier run did says nothing about the speed of this one.
            self._bar = tqdm(total=total, initial=done, unit=f" {self._unit}", disable=self._silent)
        self._bar.update(done - self._bar.n)


def _print_report(report: CacheReport, settings: CacheSettings) -> None:
    from diffnext.data.caching.inspection import draw_histogram, read_flows
    from diffnext.data.caching.media import describe_unread
    from diffnext.data.caching.motion import FLOW_UNIT

    if report.changes:
        print(f"updated: {report.changes}")
    for folder, count in report.datasets.items():
        print(f"{folder}: {count} examples")
    if report.skipped:
        where = settings.output / "skipped.jsonl"
        print(f"{report.skipped} of {report.items} {settings.kind} left out: see {where}")
    for note, count in sorted(report.notes.items()):
        print(f"{count} {settings.kind} {note}")
    for line in describe_unread(report.unread, settings.kind):
        print(line)
    flows = [flow for folder in report.datasets for flow in read_flows(folder)]
    if flows:
        print(f"flow, in {FLOW_UNIT}:", *draw_histogram(flows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
