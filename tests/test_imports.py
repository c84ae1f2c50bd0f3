"""Importing the package changes nothing that belongs to the whole process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Other packages come first: what they change as they are imported is theirs.
PROGRAM = """
import ast, importlib, logging, os, random, signal, sys, threading, warnings
from pathlib import Path

paths = sorted(Path("diffnext").rglob("*.py"))
modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
statements = []
for path in paths:
    for node in ast.parse(path.read_text()).body:
        name = getattr(node, "module", None) or getattr(node, "names", [ast.alias("")])[0].name
        if isinstance(node, ast.Import | ast.ImportFrom) and not name.startswith("diffnext"):
            statements.append(ast.unparse(node))
exec("\\n".join(sorted(set(statements), key=lambda line: "__future__" not in line)), {})

import numpy as np, torch

def process_state():
    backends = torch.backends
    return {
        "sys.meta_path": [repr(finder) for finder in sys.meta_path],
        "sys.path": list(sys.path),
        "hooks": [sys.excepthook, sys.displayhook, threading.excepthook, warnings.showwarning],
        "warnings": list(warnings.filters),
        "environment": list(os.environ.items()),
        "folder and umask": [os.getcwd(), os.umask(os.umask(0o22))],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "logging": [
            (name, log.level, list(log.handlers), log.propagate, log.disabled)
            for name, log in [("", logging.root), *logging.root.manager.loggerDict.items()]
            if isinstance(log, logging.Logger) and not name.startswith("diffnext")
        ],
        "threads": [threading.active_count(), torch.get_num_threads()],
        "random": [random.getstate(), str(np.random.get_state()), torch.initial_seed()],
        "torch": [
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32, torch.get_rng_state().tolist(),
        ],
    }

before = process_state()
for module in modules:
    importlib.import_module(module)
after = process_state()
for name, values in after.items():
    if values != before[name]:
        print(name, [value for value in values if value not in before[name]] or "less or reordered")
"""


def test_importing_every_module_changes_nothing_process_wide():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
