"""Several processes: the weights, the predictions and the files of one."""
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_tiny
from processes import ended, kill, launch

from iceaggr import distributed
from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer, predict_dataset, read_weights
from iceaggr.training import TrainSettings, fit, train

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)
SETTINGS = TrainSettings(epochs=2, batch_size=8, graph_pulses=128, valid_events=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "81 events to train on, 9 kept back, 20 to validate on: eleven steps an epoch, the last of them with one event."
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 50, 2: 40, 3: 20})


def fit_double(data, run, settings=SETTINGS, poison=(), optimizer=None, clocks=None, resume=False, **model):
    "Train in double precision."
    with distributed.process_group("cpu"):
        ds, valid = IceCubeDataset(data, batch_ids=[1, 2], cache_size=2), IceCubeDataset(data, batch_ids=[3])
        ds.targets = ds.targets.copy()
        ds.targets[list(poison)] = np.nan
        torch.manual_seed(distributed.rank())                                      # process 0 gives the others its weights
        net = HierarchicalTransformer(dict(TINY, **model), ds.geometry).double()
        run.mkdir(exist_ok=True)
        adamw = torch.optim.AdamW(net.parameters(), lr=settings.lr) if optimizer == "adamw" else None
        clock = dict(clock=clocks[distributed.rank()]) if clocks else {}
        return fit(net, ds, valid, run, settings, resume, progress=False, optimizer=adamw, **clock)


def checkpoint(run):
    return torch.load(run / "state.pt", weights_only=True)


def difference(one, two):
    "The largest difference of the weights and of their averages."
    one, two = checkpoint(one), checkpoint(two)
    assert one["step"] == two["step"] and one["model"]["t2.embed.weight"].dtype == torch.float64
    return max(float((one[which][k] - two[which][k]).abs().max()) for which in ("model", "average") for k in one[which])


NO_TIME = ["epoch", "step", "lr", "train_loss", "held_out_loss", "held_out_mean_degrees", "valid_loss", "valid_mean_degrees", "valid_median_degrees", "skipped_steps"]


def log_of(run):
    return pd.read_csv(run / "log.csv")[NO_TIME]


@pytest.mark.parametrize("optimizer", [None, "adamw"])
def test_two_processes_give_the_weights_of_one(data, tmp_path, optimizer):
    together = launch(tmp_path / "out", fit_double, data, tmp_path / "two", optimizer=optimizer, world=2)
    fit_double(data, tmp_path / "one", optimizer=optimizer)
    assert ended(together) == [0, 0], (tmp_path / "out").read_text()
    assert checkpoint(tmp_path / "one")["step"] == 22
    print("difference", difference(tmp_path / "one", tmp_path / "two"))
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9
    pd.testing.assert_frame_equal(log_of(tmp_path / "one"), log_of(tmp_path / "two"), rtol=1e-6)
