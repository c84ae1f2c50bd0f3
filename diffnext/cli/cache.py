"""The command line that builds record datasets of latents."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
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

The same command continues a build that was killed; at most the current chunk is lost. Files that
cannot be used are left out and listed, with the reason, in OUTPUT/skipped.jsonl.
"""
EPILOG = """\
several sizes, each example to the one of the nearest shape; a dataset each in OUTPUT/768x1344 ...:
  diffnext cache images photos --output data --vae nova/vae --buckets 1024
  diffnext cache images photos --output data --vae nova/vae --size 1024 768x1344 1344x768

from a table, relative to the table's folder:
  diffnext cache images list.csv --output data --vae nova/vae --size 1024 --caption-column prompt

on all GPUs of the machine, or on several machines that see the same folders (the same command on
each; they share the work, and take over the chunks of a machine that goes down):
  accelerate launch -m diffnext cache images photos --output data --vae nova/vae --size 1024

after pictures or captions were changed, added or removed:
  diffnext cache images photos --output data --vae nova/vae --size 1024 --update

exit codes: 0 built, 1 an error (the last line says which), 2 a wrong command line, 130 interrupted
"""
GROUPS = {  # of options, by the names of the settings
    "source": "format split root media_column caption_column text_column label_column flow_column",
    "pictures": "resize max_upscale max_pixels flip",
    "clips": "num_frames stride fps clips short flow decoder",
    "captions": "labels empty_captions max_caption text_encoder text_length",
    "work": "batch_size dtype device workers chunk_size shard_size on_error time_limit update",
}
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
    from diffnext.data.caching.settings import USUAL_BATCH_SIZES

    parser = command_parser("diffnext cache", DESCRIPTION, EPILOG)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="images|videos")
    for kind, batch_size in USUAL_BATCH_SIZES.items():
        command = kinds.add_parser(
            kind,
            help=f"build a dataset of {kind}",
            description=DESCRIPTION,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("source", help="folder, glob pattern, table or archive")
        _add_options(command, kind)
        command.set_defaults(batch_size=batch_size, workers=min(os.cpu_count() or 1, 8))
        command.set_defaults(dtype=None, device=None, chunk_size=None)
    return parser


def _add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    from diffnext.data.caching.settings import CacheSettings, Columns, FrameSampling

    columns = {f"{setting.name}_column": setting for setting in fields(Columns)}
    others = {
        setting.name: setting for of in (CacheSettings, FrameSampling) for setting in fields(of)
    }
    settings = columns | others
    for name in ("output", "vae"):
        _add_option(parser, name, settings[name])
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
        help="instead of --size: sizes of about SIDE x SIDE pixels and aspects from 1:2 to 2:1",
    )
    for title, names in GROUPS.items():
        if title != "clips" or kind == "videos":
            group = parser.add_argument_group(title)
            for name in names.split():
                _add_option(group, name, settings[name])
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_option(parser: argparse._ActionsContainer, name: str, setting: Field[Any]) -> None:
    """Offer a setting."""
    flag, meaning = f"--{name.replace('_', '-')}", setting.metadata["meaning"]
    if setting.default is False:
        parser.add_argument(flag, action="store_true", help=meaning)
        return
    is_required = setting.default is MISSING
    is_complete = is_required or setting.default is None or meaning.endswith(")")
    parser.add_argument(
        flag,
        type=setting.metadata["kind"],
        required=is_required,
        default=None if is_required else setting.default,
        choices=setting.metadata["choices"],
        metavar=setting.metadata["metavar"],
        help=meaning if is_complete else f"{meaning} ({setting.default})",
    )


def _run(args: argparse.Namespace) -> int:
    settings = make_settings(args, args.device)
    from diffnext.data.caching.building import build_cache  # takes seconds

    is_main = os.environ.get("RANK", "0") == "0"
    is_silent = args.quiet or not is_main
    with _progress(is_silent, args.kind) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # skipped.jsonl names the problems
        report = build_cache(settings, progress)
    if is_main:
        _print_report(report, settings)
    return 0


def make_settings(args: argparse.Namespace, device: str | None) -> CacheSettings:
    """The settings that a command line asks for; without a device, a GPU if there is one.

    Raises:
        CacheError: If they are impossible.
    """
    from diffnext.data.caching.settings import CacheSettings, Columns, FrameSampling

    def given(kind: type, suffix: str = "") -> dict[str, Any]:
        names = [setting.name for setting in fields(kind)]
        return {n: getattr(args, n + suffix) for n in names if hasattr(args, n + suffix)}

    sizes = _choose_sizes(args)
    device = device or _choose_device()
    # At the end of a chunk, the last batch of each size is filled up.
    usual_chunk_size = 8 if args.kind == "videos" else 64 * len(sizes)
    values = given(CacheSettings) | {
        "sizes": sizes,
        "columns": Columns(**given(Columns, "_column")),
        "frames": FrameSampling(**given(FrameSampling)),
        "chunk_size": usual_chunk_size if args.chunk_size is None else args.chunk_size,
        "dtype": args.dtype or ("float32" if device == "cpu" else "float16"),
        "device": device,
    }
    return CacheSettings(**values)


def _choose_sizes(args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    from diffnext.data.caching.geometry import bucket_sizes
    from diffnext.data.caching.settings import parse_size

    if args.size is None:
        return bucket_sizes(args.buckets)
    return tuple(parse_size(size) for size in args.size)


def _choose_device() -> str:
    """A GPU if there is one; each process of a launcher its own."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return f"{kind}:{int(os.environ.get('LOCAL_RANK', 0)) % torch.accelerator.device_count()}"


@contextlib.contextmanager
def _progress(is_silent: bool, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left; the first call sets its length."""
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:  # the items of an earlier run say nothing about the speed of this one
            bar = tqdm(total=total, initial=done, unit=f" {unit}", disable=is_silent)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _print_report(report: CacheReport, settings: CacheSettings) -> None:
    from diffnext.data.caching.inspection import draw_histogram, summarize
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
    folders = report.datasets if settings.kind == "videos" else ()
    flows = [flow for folder in folders for flow in summarize(folder).flows]
    if flows:
        print(f"flow, in {FLOW_UNIT}:", *draw_histogram(flows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
