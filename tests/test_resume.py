"""Runs that are killed, interrupted, or find the disk full: nothing is lost, and a resume ends with the weights of an undisturbed run."""
import errno
import os
import random
import resource
import signal
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_tiny
from processes import ended, kill, launch

from iceaggr import training
from iceaggr.cli import main
from iceaggr.model import read_weights
from iceaggr.training import TrainSettings, train

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 40, 2: 10})


def run_training(data, run, epochs=4, save_every_step=True, kill_at=None, full_at=None, largest=None):
    "Start or resume a run, as a script for a batch system would; with a checkpoint after each step."
    if kill_at is not None or full_at is not None: meddle(kill_at, full_at)
    if largest is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    settings = TrainSettings(epochs=epochs, batch_size=4, valid_events=10, held_out=4, save_minutes=1e-9 if save_every_step else 5)
    train(data, run, TINY, [1], [2], settings, resume=(run / "settings.json").exists(), device="cpu", progress=False)


def meddle(kill_at, full_at):
    "Kill this process just before or after it renames a file, or let a write find the disk full."
    calls, rename, sync = iter(range(10**9)), os.replace, os.fsync
    def replace(*args):
        k = next(calls)
        if kill_at == 2 * k: os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)
        if kill_at == 2 * k + 1: os.kill(os.getpid(), signal.SIGKILL)
    syncs = iter(range(10**9))
    def fsync(*args):
        if next(syncs) == full_at: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(*args)
    os.replace, os.fsync = replace, fsync


def result(run):
    "All that must not depend on interruptions."
    state = torch.load(run / "state.pt", weights_only=True)
    tensors = {f"{which}.{k}": x for which in ("model", "average", "best_weights") for k, x in state[which].items()}
    tensors |= {f"{name}.{k}": x for name in ("best", "last") for k, x in read_weights(run / f"{name}.safetensors")[1].items()}
    log = pd.read_csv(run / "log.csv").drop(columns=["minutes", "events_per_s"])
    return tensors, log, sorted(p.name for p in run.iterdir())


def same(run, expected):
    tensors, log, files = result(run)
    assert tensors.keys() == expected[0].keys() and all(torch.equal(x, expected[0][k]) for k, x in tensors.items())
    pd.testing.assert_frame_equal(log, expected[1], check_exact=True)
    assert files == expected[2]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    "What a run gives that nothing happens to; it saves after its epochs only."
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training(data, run, save_every_step=False)
    return result(run)


def kills(data, folder, expected, wanted, seed=0):
    "Kill a run after random times until it ends in spite of it, and so on, so many kills in all; says how many there were and how many came during a write."
    draw, killed, writing, finished, longest = random.Random(seed), 0, 0, 0, 0.6
    while killed < wanted:
        run = folder / f"run{finished}"
        while True:
            processes = launch(folder / "output", run_training, data, run)
            if killed < wanted:
                time.sleep(draw.uniform(0, longest))
                if kill(processes):
                    killed += 1
                    writing += any(".part" in p.name for p in run.glob(".*")) if run.exists() else 0
                    continue
            codes = ended(processes)
            assert codes == [0], (folder / "output").read_text()
            break
        same(run, expected)
        finished += 1
    return dict(kills=killed, during_a_write=writing, runs_finished=finished)


def test_killed_at_random(data, undisturbed, tmp_path):
    assert kills(data, tmp_path, undisturbed, 3)["kills"] == 3
