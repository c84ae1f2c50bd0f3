"""A process that does one piece of work whenever it is told to.

Reads a JSON object from its command line, then a word a line from standard input: ``run`` answers
with the seconds it took, ``count`` with the operations and matrix work of one run, ``save PATH``
with the result in a file. Answers are JSON objects, one a line.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

# Beside this file, and not by way of ``diffnext``, which may be the baseline's.
from works import WORKS, Work

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class OperationCounter(TorchDispatchMode):
    """Counts operations that do something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do it."""
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str]) -> None:
    """Build the work, then answer until the input ends."""
    settings = json.loads(argv[0])
    torch.set_num_threads(settings["threads"])
    work = WORKS[settings["work"]](settings["spec"], settings["is_plain"])
    result = None
    answer({"ready": True})
    for line in sys.stdin:
        word, *arguments = line.split(maxsplit=1)
        if word == "run":
            result, report = timed(work)
            answer(report)
        elif word == "count":
            answer(counted(work))
        elif word == "save":
            torch.save(None if result is None else result.float().cpu(), arguments[0].strip())
            answer({"saved": result is not None})


def timed(work: Work) -> tuple[Any, dict[str, float]]:
    """Run once."""
    synchronize(work)
    begin = time.perf_counter()
    result = work.run()
    synchronize(work)
    seconds = time.perf_counter() - begin
    if hasattr(work, "seconds"):
        seconds = work.seconds()
    return result, {"seconds": seconds, "rate": work.count() / seconds, "peak_mb": peak(work)}


def counted(work: Work) -> dict[str, float]:
    """Operations and floating-point operations of matrix products of one run."""
    with OperationCounter() as operations:
        work.run()
    mapping = {CPU_ATTENTION: lambda q, k, v, *a, **kw: sdpa_flop(q, k, v)}
    if torch.backends.mkldnn.is_available():  # products of packed weights
        packed = torch.ops.mkldnn._linear_pointwise
        mapping[packed] = lambda x, weight, *a, **kw: 2 * math.prod(x) * weight[0]
    with FlopCounterMode(display=False, custom_mapping=mapping) as flops:
        work.run()
    return {"operations": operations.count, "flops": flops.get_total_flops()}


def is_on_gpu(work: Work) -> bool:
    """Whether the clock must wait for a GPU."""
    return str(work.spec.get("device", "cpu")).startswith("cuda")


def synchronize(work: Work) -> None:
    """Wait for what was launched."""
    if is_on_gpu(work):
        torch.cuda.synchronize()


def peak(work: Work) -> float:
    """Largest memory so far, in MB: of the GPU, or of the process."""
    if is_on_gpu(work):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def answer(report: dict[str, Any]) -> None:
    """Write one line."""
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
