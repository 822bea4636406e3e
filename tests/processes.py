"""Processes to join and to kill: a server that has imported torch forks them, so each starts in a moment."""
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "pytest", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "pyarrow.dataset",
    "iceaggr.training", "iceaggr.cli",
])


def entered(output, errors, env, function, args, kwargs):
    "What a process does."
    sys.stdout.flush()
    sys.stderr.flush()
    for path, stream in ((output, 1), (errors or output, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    os.environ.clear()     # the server has the environment of the time when it started
    os.environ.update(env)
    function(*args, **kwargs)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environments(env, world):
    "That of one process, or those of as many as torchrun would start."
    env = {**os.environ, **(env or {})}
    if world is None: return [env]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**env, **shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def launch(output, function, *args, world=None, env=None, errors=None, daemon=True, **kwargs):
    "Start processes. What they print goes to a file; what they print on stderr, to `errors` if given."
    errors = str(errors) if errors else None
    processes = [
        FORKS.Process(target=entered, args=(str(output), errors, e, function, args, kwargs), daemon=daemon)
        for e in environments(env, world)
    ]
    for p in processes: p.start()
    return processes


def ended(processes, timeout=120):
    "Their exit codes. A process that hangs is killed and gives None."
    codes = []
    for p in processes:
        p.join(timeout)
        codes.append(p.exitcode)
        if p.exitcode is None: p.kill()
    return codes


def kill(processes):
    "SIGKILL to all; True if they were all alive."
    alive = all(p.is_alive() for p in processes)
    for p in processes:
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
    ended(processes)
    return alive and all(p.exitcode == -signal.SIGKILL for p in processes)


def run_command(argv):
    "What `python -m iceaggr.cli` does."
    from iceaggr.cli import main
    sys.exit(main(argv))


def run_script(path, argv):
    "What `python path` does."
    sys.argv[:] = [path, *argv]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def call(*args, script=None, timeout=300):
    "Run the command, or a script, to its end. The result is that of subprocess.run."
    args = [str(a) for a in args]
    what = (run_command,) if script is None else (run_script, str(script))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        processes = launch(out, *what, args, errors=err, daemon=False)     # it may start processes of its own
        code, = ended(processes, timeout)
        return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())
