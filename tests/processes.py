"""Processes to join and to kill: a server that has imported torch forks them, so that one starts in a moment."""
import multiprocessing
import os
import signal
import socket
import sys

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "pyarrow.dataset", "iceaggr.training", "iceaggr.cli"])


def entered(output, env, function, args, kwargs):
    "What a process does."
    sys.stdout.flush(), sys.stderr.flush()
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    torch.set_num_threads(1)
    os.environ.update(env)
    function(*args, **kwargs)


def launch(output, function, *args, world=None, env=None, **kwargs):
    "Start a process, or as many as torchrun would; what they print goes to a file."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    envs = [env or {}] if world is None else [dict(env or {}, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for r in range(world)]
    processes = [FORKS.Process(target=entered, args=(str(output), e, function, args, kwargs), daemon=True) for e in envs]
    for p in processes: p.start()
    return processes


def ended(processes, timeout=120):
    "Their exit codes; a process that hangs is killed and gives None."
    codes = []
    for p in processes:
        p.join(timeout)
        codes.append(p.exitcode)
        if p.exitcode is None: p.kill()
    return codes


def kill(processes):
    "SIGKILL; True if it found them all alive."
    alive = all(p.is_alive() for p in processes)
    for p in processes: os.kill(p.pid, signal.SIGKILL) if p.is_alive() else None
    ended(processes)
    return alive and all(p.exitcode == -signal.SIGKILL for p in processes)
