"""Check and measure everything that needs a GPU, in at most 8 minutes.

    python scripts/dev/check_gpu.py --output gpu_check
    python scripts/dev/check_gpu.py --baseline /path/to/folder/with/another/diffnext
    python scripts/dev/check_gpu.py --rehearse            # every row, small, on the CPU
    python scripts/dev/check_gpu.py --list --only training

Each row runs in its own process, until its end or its limit, so a row that hangs or crashes does
not cost another. Rows that measure time come first, one by one, then the others side by side.
Weights are random; nothing is downloaded. The output folder gets report.json, report.md (also when
the check is interrupted), and what each row printed. The exit code is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarking.gpu_rows import BASELINE_ROWS, ROOT, ROWS, Context, Row
from benchmarking.processes import Job, Outcome, run_job
from benchmarking.tables import format_table
from diffnext.cli.parsing import command_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.row is not None:
        run_row(args)
        return 0
    rows = choose_rows(parser, args)
    if args.list:
        for row in rows:
            print(f"{row.name:<16} {row.limit * args.limit_scale:5.3g} s")
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --rehearse runs the rows on the CPU, small")
    args.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if args.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    jobs = [make_job(row, args) for row in rows]
    at_once = 1 if args.rehearse else len(jobs)
    outcomes = run_jobs(jobs, args.output, at_once, environment)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    print(f"{len(outcomes)} rows, {failed} failed; see {args.output / 'report.md'}")
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("check_gpu.py", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("gpu_check"), help="folder to write")
    add("--rehearse", action="store_true", help="on the CPU, with small models")
    add("--only", default="*", metavar="PATTERN", help="rows whose name has this")
    add("--list", action="store_true", help="name rows and limits; runs nothing")
    add("--baseline", type=Path, help="folder of another diffnext to draw with")
    add("--limit-scale", type=float, help="of the limits (1; rehearsing 10)")
    add("--row", help=argparse.SUPPRESS)
    return parser


def choose_rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Row]:
    """The rows to run; completes the arguments."""
    if args.limit_scale is None:
        args.limit_scale = 10.0 if args.rehearse else 1.0
    if args.limit_scale <= 0:
        parser.error(f"--limit-scale must be greater than 0, got {args.limit_scale}")
    if args.baseline and not (args.baseline / "diffnext").is_dir():
        parser.error(f"--baseline {args.baseline} holds no folder diffnext")
    rows = [*ROWS, *(BASELINE_ROWS if args.baseline else ())]
    chosen = [row for row in rows if fnmatch.fnmatch(row.name, f"*{args.only}*")]
    if not chosen:
        parser.error(f"--only {args.only}: no row has this name; --list names them")
    return chosen


def run_row(args: argparse.Namespace) -> None:
    """Run one row in this process; its figures are printed, one object per line."""
    (row,) = [row for row in (*ROWS, *BASELINE_ROWS) if row.name == args.row]
    folder = (args.output / row.name.replace(" ", "-")).resolve()
    folder.mkdir(exist_ok=True)
    for figures in row.measure(Context(args.rehearse, folder, args.baseline)):
        print(json.dumps(figures), flush=True)


def make_job(row: Row, args: argparse.Namespace) -> Job:
    """The process that runs a row."""
    command = [sys.executable, __file__, "--row", row.name, "--output", str(args.output)]
    command += ["--rehearse"] if args.rehearse else []
    command += ["--baseline", str(args.baseline)] if args.baseline else []
    return Job(row.name, command, row.limit * args.limit_scale, row.is_timed)


def run_jobs(
    jobs: Sequence[Job], folder: Path, at_once: int, environment: Mapping[str, str] = os.environ
) -> list[Outcome]:
    """Run the timed jobs one by one, then the others; report after each.

    Args:
        jobs: What to run.
        folder: Gets the report, and what the jobs print.
        at_once: How many of the others run side by side.
        environment: Of the jobs.
    """
    outcomes: list[Outcome] = []

    def run(job: Job) -> Outcome:
        say(f"{job.name}: at most {job.limit:.3g} s")
        return run_job(job, folder, environment)

    def finish(outcome: Outcome) -> None:
        say(f"{outcome.name}: {outcome.error or 'passed'}, {outcome.seconds:.1f} s")
        outcomes.append(outcome)
        write_report(outcomes, folder)

    for job in jobs:
        if job.is_alone:
            finish(run(job))
    pool = ThreadPoolExecutor(at_once)
    try:
        for future in as_completed([pool.submit(run, job) for job in jobs if not job.is_alone]):
            finish(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes


def say(words: str) -> None:
    """Print a line, also from a thread."""
    sys.stdout.write(f"{time.strftime('%X')} {words}\n")
    sys.stdout.flush()


def write_report(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the outcomes so far."""
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    (folder / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    head = [
        {"row": one.name, "outcome": one.error or "passed", "s": one.seconds} for one in outcomes
    ]
    figures = add_shares([one for outcome in outcomes for one in outcome.answers])
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in figures:
        groups.setdefault(next(iter(one)), []).append(one)
    tables = [format_table(group) for group in (head, *groups.values())]
    (folder / "report.md").write_text("\n\n".join(tables) + "\n")


def add_shares(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say for each drawing how near it comes to its floor, which the eager drawing has."""
    floors = {one["drawing"]: one["floor, s"] for one in figures if "floor, s" in one}
    shares = [
        {"share of the floor": floors[one["drawing"]] / one["s"]}
        if one.get("drawing") in floors
        else {}
        for one in figures
    ]
    return [one | share for one, share in zip(figures, shares, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
