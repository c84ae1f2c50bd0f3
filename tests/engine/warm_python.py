#!/usr/bin/env python3
"""Runs a script as ``python`` does, in a fork of a process that has imported the libraries already.

A launched run of two processes imports PyTorch and all that is built on it three times, which
takes longer than six steps of a tiny model. ``warm_python.py --serve SOCKET [MODULE ...]`` imports
them once. With ``WARM_SOCKET`` set, ``warm_python.py [-u] [-m MODULE | SCRIPT] ARGUMENT ...`` asks
it for a fork with its own arguments, environment, folder and output, and ends as that fork ends.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback

PRELOADED = (
    "accelerate.commands.launch",
    "diffnext.engine.training_run",
    "diffnext.pipelines",
    "diffnext.pipelines.nova.pipeline_nova",
    "torch.distributed.run",
)


def ask(arguments: list[str]) -> int:
    """Let the server run it, with this process's output; returns the exit code."""
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["WARM_SOCKET"])
        socket.send_fds(server, [b"f"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        answer = server.makefile().readline()
    return int(answer or 1)


def serve(path: str, *modules: str) -> None:
    """Fork for every connection, until the process that started this one has ended."""
    for name in (*PRELOADED, *modules):
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            if select.select([server], [], [], 1)[0]:
                connection, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    attend_to(connection)
                connection.close()


def attend_to(connection: socket.socket) -> None:
    """Fork once more, wait for that process, and tell its exit code; end it if nobody waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        become(request, files)
    for file in (*files, 0, 1, 2):
        os.close(file)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def become(request: dict, files: list[int]) -> None:
    """Run the script as the main program of this process, and end the process."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    code = 0
    try:
        run([argument for argument in request["arguments"] if argument != "-u"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:])
    else:
        sys.exit(ask(sys.argv[1:]))
