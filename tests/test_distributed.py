"""Several processes: the weights, the predictions and the files of one."""
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_tiny
from processes import ended, launch

from iceaggr.cli import main
from iceaggr.data import IceCubeDataset
from iceaggr.engine import distributed
from iceaggr.engine.checkpoints import has_checkpoint
from iceaggr.geometry import Geometry
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.training import TrainSettings, fit, train
from iceaggr.weights import read_weights

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)
SETTINGS = TrainSettings(epochs=2, batch_size=8, graph_pulses=128, valid_events=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "81 events to train on, 9 kept back, 20 to validate on: eleven steps an epoch, the last of them with one event."
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 50, 2: 40, 3: 20})


class Interrupting(IceCubeDataset):
    "Sends a signal to this process when the n-th batch is read."
    reads, at, signal = 0, None, None
    def hits(self, indices):
        self.reads += 1
        if self.reads == self.at: os.kill(os.getpid(), self.signal)
        return super().hits(indices)


def fit_double(data, run, settings=SETTINGS, poison=(), adamw=False, taught=False, speeds=None, stop=None, **model):
    "Train in double precision, or go on; poison: events with no finite target; taught: by a teacher that knows nothing; speeds: of the clocks of the processes; stop: process, n-th batch that it reads, signal that it gets."
    with distributed.process_group("cpu"):
        rank, ds, valid = distributed.rank(), Interrupting(data, batch_ids=[1, 2], cache_size=2), IceCubeDataset(data, batch_ids=[3])
        if stop and stop[0] == rank: ds.at, ds.signal = stop[1:]
        ds.targets = ds.targets.copy()
        ds.targets[list(poison)] = np.nan
        torch.manual_seed(rank)                                                    # process 0 gives the others its weights
        net = HierarchicalTransformer(dict(TINY, **model), ds.geometry).double()
        run.mkdir(exist_ok=True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr) if adamw else None
        random = np.random.default_rng(0).random((3, len(ds))) * [[2 * np.pi], [np.pi], [1]]
        teacher = pd.DataFrame(dict(zip(("azimuth", "zenith", "resultant"), random.astype(np.float32))), index=ds.event_ids) if taught else None
        clock = dict(clock=lambda: speeds[rank] * time.perf_counter()) if speeds else {}
        log = fit(net, ds, valid, run, settings, has_checkpoint(run), progress=False, optimizer=optimizer, teacher=teacher, **clock)
    if log.attrs["interrupted"]: sys.exit(130)


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


@pytest.mark.parametrize("adamw, taught", [(False, False), (True, True)])
def test_two_processes_give_the_weights_of_one(data, tmp_path, adamw, taught):
    "Step by step the same sums in another order; gradients in slices, an uneven share, and none at all in the last step of an epoch."
    two = launch(tmp_path / "out", fit_double, data, tmp_path / "two", adamw=adamw, taught=taught, world=2)
    fit_double(data, tmp_path / "one", adamw=adamw, taught=taught)
    assert ended(two) == [0, 0], (tmp_path / "out").read_text()
    assert checkpoint(tmp_path / "one")["step"] == 22 and difference(tmp_path / "one", tmp_path / "two") < 1e-9
    pd.testing.assert_frame_equal(log_of(tmp_path / "one"), log_of(tmp_path / "two"), rtol=1e-6)
    one, two = (read_weights(tmp_path / name)[1] for name in ("one", "two"))
    assert all(torch.allclose(x, two[k], rtol=0, atol=1e-9) for k, x in one.items() if k != "t2.calibration") and torch.allclose(one["t2.calibration"], two["t2.calibration"], rtol=0, atol=1e-6)


def test_all_skip_a_step_that_is_not_finite_in_one(data, tmp_path):
    settings = dataclasses.replace(SETTINGS, epochs=1)
    two = launch(tmp_path / "out", fit_double, data, tmp_path / "two", settings, poison=[3], world=2)
    fit_double(data, tmp_path / "one", settings, poison=[3])
    assert ended(two) == [0, 0], (tmp_path / "out").read_text()
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9 and log_of(tmp_path / "two").skipped_steps.tolist() == [1]
    tables = [pd.read_csv(tmp_path / name / "skipped_steps.csv", dtype=str) for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 1 and "1009" in tables[0].event_ids[0].split() and len(tables[0].event_ids[0].split()) == 8
    assert (tmp_path / "out").read_text().count("not finite") == 1                             # said once
    assert ended(launch(tmp_path / "out", fit_double, data, tmp_path / "none", settings, poison=range(90), world=2)) == [1, 1]
    assert (tmp_path / "out").read_text().count("FloatingPointError: ten steps in a row") == 2 and len(pd.read_csv(tmp_path / "none/skipped_steps.csv")) == 10


def test_one_that_is_killed_or_stopped_stops_all_and_a_resume_ends_the_same(data, tmp_path):
    settings = dataclasses.replace(SETTINGS, save_minutes=1e-9)
    start = lambda run, **kwargs: launch(tmp_path / run, fit_double, data, tmp_path / f"{run}-run", settings, dropout=0.1, taught=True, world=2, **kwargs)
    expected = start("whole")
    killed = ended(start("cut", stop=(1, 7, signal.SIGKILL)))
    assert killed[1] == -signal.SIGKILL and killed[0] == 1 and "has lost the others" in (tmp_path / "cut").read_text()
    assert 0 < checkpoint(tmp_path / "cut-run")["step"] < 11
    assert ended(start("cut", stop=(1, 12, signal.SIGTERM))) == [130, 130] and not checkpoint(tmp_path / "cut-run")["finished"]
    assert ended(start("cut")) == [0, 0] and ended(expected) == [0, 0], (tmp_path / "cut").read_text()
    assert difference(tmp_path / "whole-run", tmp_path / "cut-run") == 0
    pd.testing.assert_frame_equal(log_of(tmp_path / "whole-run"), log_of(tmp_path / "cut-run"), check_exact=True)


def test_the_first_has_the_clock(data, tmp_path):
    settings, started = dataclasses.replace(SETTINGS, minutes=0.03), time.monotonic()
    assert ended(launch(tmp_path / "out", fit_double, data, tmp_path / "run", settings, speeds=[1., 1e6], world=2)) == [0, 0], (tmp_path / "out").read_text()
    state = checkpoint(tmp_path / "run")
    assert state["finished"] and 60 * settings.minutes <= state["seconds"] <= time.monotonic() - started      # the other's clock shows a step as hours


def predict_in_parts(data, out):
    with distributed.process_group("cpu"):
        torch.manual_seed(0)
        ds = IceCubeDataset(data, batch_ids=[1, 2])
        net = HierarchicalTransformer(TINY, ds.geometry)
        for most in (100, 10**6):                                                  # many batches; one, so that the second process has none
            predict_dataset(net, ds, max_pulses=most, progress=False).to_parquet(f"{out}-{most}-{distributed.rank()}.parquet")
        some = np.array([70, 3, 41])
        predict_dataset(net, ds, some, max_pulses=30, progress=False).to_parquet(f"{out}-some-{distributed.rank()}.parquet")


def test_predictions_of_two_processes_are_those_of_one(data, tmp_path):
    two = launch(tmp_path / "out", predict_in_parts, data, tmp_path / "two", world=2)
    predict_in_parts(data, tmp_path / "one")
    assert ended(two) == [0, 0], (tmp_path / "out").read_text()
    for which, rows in ((100, 90), (10**6, 90), ("some", 3)):
        one = pd.read_parquet(tmp_path / f"one-{which}-0.parquet")
        assert len(one) == rows
        for rank in range(2): pd.testing.assert_frame_equal(one, pd.read_parquet(tmp_path / f"two-{which}-{rank}.parquet"), check_exact=True)


def of_other_events(data, run, predicting):
    with distributed.process_group("cpu"):
        other = data / str(distributed.rank())
        if predicting: predict_dataset(HierarchicalTransformer(TINY, Geometry.nominal()), IceCubeDataset(other), progress=False)
        else: train(other, run, TINY, [1], [2], TrainSettings(epochs=1), device="cpu", progress=False)


@pytest.mark.parametrize("predicting", [False, True])
def test_other_events_on_another_host_are_refused(tmp_path, predicting):
    "As many, of the same numbers."
    for rank in range(2): write_tiny(tmp_path / str(rank), {1: 40, 2: 10}, seed=rank)
    assert ended(launch(tmp_path / "out", of_other_events, tmp_path, tmp_path / "run", predicting, world=2)) == [1, 1]
    assert (tmp_path / "out").read_text().count("DataError: ") == 2 and "the processes see different events" in (tmp_path / "out").read_text() and not (tmp_path / "run").exists()


def refused(data, run):
    sys.exit(main(["train", "--data", str(data), "--out", str(run), "--epochs", "1", "--device", "cpu"]))


def test_an_error_of_the_first_stops_all(data, tmp_path):
    (tmp_path / "run").mkdir(), (tmp_path / "run/something").touch()
    assert ended(launch(tmp_path / "out", refused, data, tmp_path / "run", world=2)) == [2, 1]
    told = (tmp_path / "out").read_text()
    assert "not empty" in told and "process 1 stops since process 0 failed" in told and "Traceback" not in told


def each_with_a_disk_of_its_own(data, run):
    sys.exit(main(["train", "--data", str(data), "--out", f"{run}-{os.environ['RANK']}", "--epochs", "1", "--device", "cpu", "--train-batches", "1,2", "--valid-batches", "3", "--resume"]))


def test_a_checkpoint_that_one_does_not_see_is_no_new_start(data, tmp_path):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run-0"), "--epochs", "1", "--device", "cpu", "--train-batches", "1,2", "--valid-batches", "3"]) == 0
    before = (tmp_path / "run-0/state.pt").read_bytes()
    assert ended(launch(tmp_path / "out", each_with_a_disk_of_its_own, data, tmp_path / "run", world=2)) == [1, 1]
    assert "a disk that all hosts share" in (tmp_path / "out").read_text()
    assert (tmp_path / "run-0/state.pt").read_bytes() == before and not (tmp_path / "run-1").exists()


def torchrun(*args):
    "Run a verb with two processes."
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "iceaggr.cli", *map(str, args)], capture_output=True, text=True, timeout=300)


def test_the_command_under_torchrun(data, tmp_path):
    run = tmp_path / "run"
    done = torchrun("train", "--data", data, "--out", run, "--epochs", 1, "--train-batches", "1,2", "--valid-batches", 3, "--device", "cpu", "--workers", 1)
    assert done.returncode == 0 and done.stdout.count("best epoch 1") == 1, done.stderr
    assert sorted(p.name for p in run.iterdir()) == ["best.safetensors", "curves.png", "last.safetensors", "log.csv", "settings.json", "state.pt"]
    done = torchrun("predict", "--run", run, "--data", data, "--out", tmp_path / "p.csv", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.count("110 predictions") == 1, done.stderr
    assert main(["predict", "--run", str(run), "--data", str(data), "--out", str(tmp_path / "one.csv"), "--device", "cpu"]) == 0
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.slow
def test_the_slurm_script_requeues_and_resumes(data, tmp_path):
    "With stand-ins for Slurm's own commands: the job gets the signal of the time limit, asks to be queued again, and goes on when it is."
    bin, asked, run, step = tmp_path / "bin", tmp_path / "asked", tmp_path / "run", tmp_path / "step"
    bin.mkdir()
    (bin / "srun").write_text(f'#!/bin/bash\nshift\n"$@" &\necho $! > {step}\ntrap "kill -KILL $!; exit 137" TERM\nwait $!\n')      # as srun does with TERM
    (bin / "scancel").write_text(f'#!/bin/bash\nif [ "$*" = "--signal=TERM $SLURM_JOB_ID" ]; then kill -TERM $(cat {step}); fi\n')
    (bin / "scontrol").write_text(f'#!/bin/bash\nif [ "$1" = requeue ]; then echo "$2" >> {asked}; else echo localhost; fi\n')
    for file in bin.iterdir(): file.chmod(0o755)
    env = dict(os.environ, PATH=f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}", SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="localhost", SLURM_JOB_NUM_NODES="1", PROCESSES="2")
    script = [Path(__file__).parents[1] / "data_scripts/train.sbatch", "--data", data, "--out", run, "--epochs", "30", "--train-batches", "1,2", "--valid-batches", "3", "--device", "cpu", "--save-minutes", "0.001"]
    start = lambda: subprocess.Popen(["bash", *map(str, script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job, until = start(), time.monotonic() + 120
    while not (run / "state.pt").exists() and job.poll() is None and time.monotonic() < until: time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=120)[0]
    assert job.returncode != 0 and asked.read_text().split() == [str(os.getpid())] and "resume with" in told, told
    assert not checkpoint(run)["finished"]
    job = start()
    told = job.communicate(timeout=300)[0]
    assert job.returncode == 0 and checkpoint(run)["finished"] and len(log_of(run)) == 30, told
    assert len(asked.read_text().split()) == 1
    done = subprocess.run(["bash", script[0], "--data", data], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "--out" in done.stderr
