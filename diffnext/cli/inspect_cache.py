"""The command line that looks into record datasets, checks and reshapes them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffnext.cli.parsing import command_parser, run

if TYPE_CHECKING:
    from diffnext.data.caching.inspection import Summary

DESCRIPTION = """\
Look into a record dataset, check it, or make other datasets of it.

  diffnext inspect show img_dataset                   counts, shapes, some captions
  diffnext inspect show img_dataset --source          where each record came from, with its hash
  diffnext inspect check img_dataset                  reads every record; exit code 1 if one is bad
  diffnext inspect verify img_dataset                 compares every record with its checksum
  diffnext inspect sheet img_dataset sheet.png --vae nova/vae   decoded, with captions
  diffnext inspect split img_dataset train test --share 0.99
  diffnext inspect merge one two --output both
  diffnext inspect reshard img_dataset resharded --shard-size 10000
"""
MAX_PROBLEMS = 20  # shown
CAPTION_WIDTH = 100
MEGABYTE = 1e6
OLD_FLOW_UNIT = "hundredths of the short side (an earlier version's unit)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.

    Returns:
        The exit code: 0, or 1 after an error or if a check finds something wrong.
    """
    args = build_parser().parse_args(argv)
    return run(lambda: args.run(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("diffnext inspect", DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], meaning: str
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=meaning)
        found.set_defaults(run=run)
        return found

    show = command("show", _show, "counts, shapes, some captions")
    show.add_argument("--captions", type=int, default=5, metavar="N", help="captions shown (5)")
    show.add_argument(
        "--source", action="store_true", help="a line for each record: number, source, hash"
    )
    check = command("check", _check, "read every record")
    verify = command("verify", _verify, "compare every record with its checksum")
    for parts in (show, check, verify):
        parts.add_argument("dataset", type=Path, help="folder of a dataset, or of several sizes")

    sheet = command("sheet", _sheet, "draw decoded examples")
    sheet.add_argument("dataset", type=Path)
    sheet.add_argument("picture", type=Path, help="file to write, such as sheet.png")
    sheet.add_argument("--vae", type=Path, help="folder of the autoencoder that made it")
    sheet.add_argument("--num", type=int, default=16, help="examples, evenly spaced (16)")
    sheet.add_argument("--columns", type=int, default=4, help="of the sheet (4)")
    sheet.add_argument("--device", default="cpu", help="where to decode (cpu)")

    reshard = command("reshard", _reshard, "the same records in other files")
    reshard.add_argument("dataset", type=Path)
    reshard.add_argument("output", type=Path, help="new folder")
    reshard.add_argument("--shard-size", type=int, required=True, help="examples per shard")

    merge = command("merge", _merge, "one dataset of several")
    merge.add_argument("datasets", type=Path, nargs="+")
    merge.add_argument("--output", type=Path, required=True, help="new folder")

    split = command("split", _split, "two datasets of one")
    split.add_argument("dataset", type=Path)
    split.add_argument("first", type=Path, help="new folder for the share")
    split.add_argument("second", type=Path, help="new folder for the rest")
    split.add_argument(
        "--share",
        type=float,
        required=True,
        help="fraction of the examples for the first, such as 0.99",
    )
    split.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    return parser


def _show(args: argparse.Namespace) -> int:
    from diffnext.data.caching.inspection import summarize
    from diffnext.data.records import find_datasets

    for folder in find_datasets(args.dataset):
        print(f"{folder}")
        if args.source:
            _print_sources(folder)
            continue
        _print_summary(summarize(folder))
        _print_captions(folder, args.captions)
    return 0


def _print_summary(summary: Summary) -> None:
    size = f"{summary.size / MEGABYTE:.1f} MB in {summary.shards} shards"
    print(f"  examples  {summary.entries}, {size}")
    print(f"  features  {', '.join(summary.features)}")
    for shape, count in summary.shapes.most_common():
        print(f"  moments   {tuple(shape)}: {count}")
    if summary.captions:
        lengths = _describe_range(summary.captions)
        print(f"  captions  {lengths} characters; {summary.texts} have a short one")
    if summary.states:
        lengths = _describe_range(summary.states)
        print(f"  states    {lengths} tokens; {summary.texts} have a short caption's")
    if summary.labels:
        print(f"  labels    {len(summary.labels)}: {min(summary.labels)} to {max(summary.labels)}")
    if summary.flows:
        known = summary.manifest and (summary.manifest.flow_unit or OLD_FLOW_UNIT)
        print(f"  flow      {_describe_range(summary.flows)}{f' {known}' if known else ''}")
    if summary.manifest is None:
        print("  manifest  none: training cannot tell which autoencoder made it")
        return
    manifest = summary.manifest
    vae = manifest.vae.folder if manifest.vae else None
    print(f"  manifest  {(manifest.vae_hash or '')[:12]} {vae}")
    if manifest.counts.skipped:
        counts = manifest.counts
        print(f"  left out  {counts.skipped} of {counts.items}: see skipped.jsonl")


def _describe_range(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}, mean {sum(values) / len(values):.4g}"


def _print_captions(folder: Path, count: int) -> None:
    import numpy as np

    from diffnext.data.records import RecordDataset

    with RecordDataset(folder) as dataset:
        places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
        for index in places.tolist():
            caption = dataset[index].get("caption")
            if isinstance(caption, str):
                print(f"  {index:>8}  {' '.join(caption.split())[:CAPTION_WIDTH]}")


def _print_sources(folder: Path) -> None:
    from diffnext.data.caching.inspection import list_sources

    for index, (source, digest) in enumerate(list_sources(folder)):
        print(f"{index}\t{source}\t{digest or 'no hash'}")


def _check(args: argparse.Namespace) -> int:
    from diffnext.data.caching.inspection import find_problems

    return _print_problems(args.dataset, find_problems)


def _verify(args: argparse.Namespace) -> int:
    from diffnext.data.manifest import read_manifest
    from diffnext.data.records import find_damage

    code = _print_problems(args.dataset, find_damage)
    manifest = read_manifest(args.dataset) if code else None
    if manifest is not None and manifest.plan is not None:
        print("the command that built it, `diffnext cache`, builds them again with --update")
    return code


def _print_problems(dataset: Path, find: Callable[[Path], Iterable[str]]) -> int:
    from diffnext.data.records import find_datasets

    count = 0
    for folder in find_datasets(dataset):
        for problem in find(folder):
            count += 1
            if count <= MAX_PROBLEMS:
                print(problem)
    if count > MAX_PROBLEMS:
        print(f"... and {count - MAX_PROBLEMS} more")
    print("no problems" if count == 0 else f"{count} problems")
    return min(count, 1)


def _sheet(args: argparse.Namespace) -> int:
    from diffnext.data.caching.contact_sheet import draw_contact_sheet
    from diffnext.utils.device_utils import parse_device

    device = str(parse_device(args.device))
    picture = draw_contact_sheet(args.dataset, args.num, args.columns, args.vae, device)
    picture.save(args.picture)
    print(f"wrote {args.picture}")
    return 0


def _reshard(args: argparse.Namespace) -> int:
    from diffnext.data.caching.reshaping import reshard

    shards = reshard(args.dataset, args.output, args.shard_size)
    print(f"{args.output}: {shards} shards")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from diffnext.data.caching.reshaping import merge

    print(f"{args.output}: {merge(args.datasets, args.output)} examples")
    return 0


def _split(args: argparse.Namespace) -> int:
    from diffnext.data.caching.reshaping import split

    counts = split(args.dataset, [args.first, args.second], args.share, args.seed)
    for folder, count in zip((args.first, args.second), counts, strict=True):
        print(f"{folder}: {count} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
