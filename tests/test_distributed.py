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
from processes import ended, launch

from iceaggr.cli import main
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector
from iceaggr.engine import distributed
from iceaggr.engine.checkpoints import has_checkpoint
from iceaggr.geometry import Geometry
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.testing import write_tiny
from iceaggr.training import TrainSettings, fit, train
from iceaggr.weights import read_weights

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)
SETTINGS = TrainSettings(epochs=2, batch_size=8, graph_pulses=128, valid_events=20)
ONE_EPOCH = dataclasses.replace(SETTINGS, epochs=1)
FILES = ["--train-batches", "1,2", "--valid-batches", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "81 events to train on (eleven steps, the last with one event), 9 held out, 20 to validate on."
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 50, 2: 40, 3: 20})


# Training in two processes

class Interrupting(IceCubeDataset):
    "Sends a signal to this process when the n-th batch is read."
    reads, interrupt_at, signal = 0, None, None

    def hits(self, indices):
        self.reads += 1
        if self.reads == self.interrupt_at: os.kill(os.getpid(), self.signal)
        return super().hits(indices)


def random_targets(ds):
    "A function that mixes the true directions with a random vector per event."
    azimuth, zenith, length = torch.tensor(np.random.default_rng(0).random((3, len(ds))), dtype=torch.float32)
    vectors = angles_to_vector(2 * np.pi * azimuth, np.pi * zenith) * length[:, None]
    place = {int(event): i for i, event in enumerate(ds.event_ids)}

    def targets(event_ids, truth):
        return 0.7 * vectors[[place[int(event)] for event in event_ids]] + 0.3 * truth

    return targets


def fit_double(
    data, # folder of the events
    run, # folder of the run, perhaps with a checkpoint
    settings=SETTINGS,
    poison=(), # positions of events without a finite target
    adamw=False, # AdamW for all parameters
    mixed=False, # learn from `random_targets`
    speeds=None, # of the clocks of the processes
    stop=None, # process, n-th batch that it reads, signal that it gets
    **model, # changed model settings
):
    "Train in double precision, or resume."
    with distributed.process_group("cpu"):
        rank = distributed.rank()
        ds = Interrupting(data, batch_ids=[1, 2], cache_size=2)
        valid = IceCubeDataset(data, batch_ids=[3])
        if stop and stop[0] == rank: ds.interrupt_at, ds.signal = stop[1:]
        ds.targets = ds.targets.copy()
        ds.targets[list(poison)] = np.nan
        torch.manual_seed(rank)      # process 0 gives the others its weights
        net = HierarchicalTransformer(dict(TINY, **model), ds.geometry).double()
        run.mkdir(exist_ok=True)
        options = dict(progress=False)
        if adamw: options["optimizer"] = torch.optim.AdamW(net.parameters(), lr=settings.lr)
        if mixed: options["targets"] = random_targets(ds)
        if speeds: options["clock"] = lambda: speeds[rank] * time.perf_counter()
        log = fit(net, ds, valid, run, settings, has_checkpoint(run), **options)
    if log.attrs["interrupted"]: sys.exit(130)


def checkpoint(run):
    "State of a run."
    return torch.load(run / "state.pt", weights_only=True)


def difference(one, two):
    "Largest difference between the weights, and the averaged weights, of two runs."
    one, two = checkpoint(one), checkpoint(two)
    assert one["step"] == two["step"]
    assert one["model"]["t2.embed.weight"].dtype == torch.float64
    return max(float((one[which][k] - two[which][k]).abs().max())
               for which in ("model", "average") for k in one[which])


def log_of(run):
    "The log of a run without its times."
    columns = ["epoch", "step", "lr", "train_loss", "held_out_loss", "held_out_mean_degrees", "valid_loss",
               "valid_mean_degrees", "valid_median_degrees", "skipped_steps"]
    return pd.read_csv(run / "log.csv")[columns]


@pytest.mark.parametrize("adamw, mixed", [(False, False), (True, True)])
def test_two_processes_give_the_weights_of_one(data, tmp_path, adamw, mixed):
    "Gradients in slices, uneven shares, and no event for one process in the last step of an epoch."
    out, options = tmp_path / "out", dict(adamw=adamw, mixed=mixed)
    two = launch(out, fit_double, data, tmp_path / "two", **options, world=2)
    fit_double(data, tmp_path / "one", **options)
    assert ended(two) == [0, 0], out.read_text()
    assert checkpoint(tmp_path / "one")["step"] == 22
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9
    pd.testing.assert_frame_equal(log_of(tmp_path / "one"), log_of(tmp_path / "two"), rtol=1e-6)
    one, two = (read_weights(tmp_path / name)[1] for name in ("one", "two"))
    for name, weights in one.items():
        tolerance = 1e-6 if name == "t2.calibration" else 1e-9
        assert torch.allclose(weights, two[name], rtol=0, atol=tolerance), name


def test_all_skip_a_step_that_is_not_finite_in_one(data, tmp_path):
    out = tmp_path / "out"
    two = launch(out, fit_double, data, tmp_path / "two", ONE_EPOCH, poison=[3], world=2)
    fit_double(data, tmp_path / "one", ONE_EPOCH, poison=[3])
    assert ended(two) == [0, 0], out.read_text()
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9
    assert log_of(tmp_path / "two").skipped_steps.tolist() == [1]
    one, two = (pd.read_csv(tmp_path / name / "skipped_steps.csv", dtype=str) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)
    assert len(one) == 1
    events = one.event_ids[0].split()
    assert "1009" in events and len(events) == 8
    assert out.read_text().count("not finite") == 1      # one message for both processes


def test_ten_steps_that_are_not_finite_stop_all(data, tmp_path):
    out = tmp_path / "out"
    two = launch(out, fit_double, data, tmp_path / "run", ONE_EPOCH, poison=range(90), world=2)
    assert ended(two) == [1, 1]
    assert out.read_text().count("FloatingPointError: ten steps in a row") == 2
    assert len(pd.read_csv(tmp_path / "run/skipped_steps.csv")) == 10


def test_one_that_is_killed_or_stopped_stops_all_and_a_resume_ends_the_same(data, tmp_path):
    settings = dataclasses.replace(SETTINGS, save_minutes=1e-9)
    whole_run, cut_run, out = tmp_path / "whole-run", tmp_path / "cut-run", tmp_path / "cut"

    def start(name, **options):
        return launch(tmp_path / name, fit_double, data, tmp_path / f"{name}-run", settings, dropout=0.1,
                      mixed=True, world=2, **options)

    whole = start("whole")
    killed = ended(start("cut", stop=(1, 7, signal.SIGKILL)))
    assert killed == [1, -signal.SIGKILL]
    assert "has lost the others" in out.read_text()
    assert 0 < checkpoint(cut_run)["step"] < 11
    assert ended(start("cut", stop=(1, 12, signal.SIGTERM))) == [130, 130]
    assert not checkpoint(cut_run)["finished"]
    assert ended(start("cut")) == [0, 0], out.read_text()
    assert ended(whole) == [0, 0], (tmp_path / "whole").read_text()
    assert difference(whole_run, cut_run) == 0
    pd.testing.assert_frame_equal(log_of(whole_run), log_of(cut_run), check_exact=True)


def test_clock_of_the_first_process_counts(data, tmp_path):
    settings, started = dataclasses.replace(SETTINGS, minutes=0.03), time.monotonic()
    speeds = [1.0, 1e6]      # on the second clock a step takes hours
    out = tmp_path / "out"
    two = launch(out, fit_double, data, tmp_path / "run", settings, speeds=speeds, world=2)
    assert ended(two) == [0, 0], out.read_text()
    state = checkpoint(tmp_path / "run")
    assert state["finished"]
    assert 60 * settings.minutes <= state["seconds"] <= time.monotonic() - started


# Predictions

def predict_in_parts(data, out):
    "Predictions in many batches, in one (the second process has none), and of three events."
    with distributed.process_group("cpu"):
        torch.manual_seed(0)
        ds, rank = IceCubeDataset(data, batch_ids=[1, 2]), distributed.rank()
        net = HierarchicalTransformer(TINY, ds.geometry)
        for max_pulses in (100, 10**6):
            table = predict_dataset(net, ds, max_pulses=max_pulses, progress=False)
            table.to_parquet(f"{out}-{max_pulses}-{rank}.parquet")
        table = predict_dataset(net, ds, np.array([70, 3, 41]), max_pulses=30, progress=False)
        table.to_parquet(f"{out}-some-{rank}.parquet")


def test_predictions_of_two_processes_are_those_of_one(data, tmp_path):
    two = launch(tmp_path / "out", predict_in_parts, data, tmp_path / "two", world=2)
    predict_in_parts(data, tmp_path / "one")
    assert ended(two) == [0, 0], (tmp_path / "out").read_text()
    for which, events in ((100, 90), (10**6, 90), ("some", 3)):
        one = pd.read_parquet(tmp_path / f"one-{which}-0.parquet")
        assert len(one) == events
        for rank in range(2):
            table = pd.read_parquet(tmp_path / f"two-{which}-{rank}.parquet")
            pd.testing.assert_frame_equal(one, table, check_exact=True)


# Mistakes

def use_other_events(data, run, predicting):
    "Predict or train where each process has a folder of its own."
    with distributed.process_group("cpu"):
        folder = data / str(distributed.rank())
        if predicting:
            net = HierarchicalTransformer(TINY, Geometry.icecube86())
            predict_dataset(net, IceCubeDataset(folder), progress=False)
        else: train(folder, run, TINY, [1], [2], ONE_EPOCH, device="cpu", progress=False)


@pytest.mark.parametrize("predicting", [False, True])
def test_other_events_on_another_host_are_refused(tmp_path, predicting):
    "The hosts have equally many events with the same ids."
    out, run = tmp_path / "out", tmp_path / "run"
    for rank in range(2): write_tiny(tmp_path / str(rank), {1: 40, 2: 10}, seed=rank)
    assert ended(launch(out, use_other_events, tmp_path, run, predicting, world=2)) == [1, 1]
    assert out.read_text().count("DataError: ") == 2
    assert "the processes see different events" in out.read_text()
    assert not run.exists()


def train_command(data, run, *options):
    "Arguments of the command that trains for one epoch on a CPU."
    return ["train", "--data", str(data), "--out", str(run), "--epochs", "1", "--device", "cpu", *options]


def run_train(data, run):
    sys.exit(main(train_command(data, run)))


def test_an_error_of_the_first_stops_all(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "something").touch()
    assert ended(launch(tmp_path / "out", run_train, data, run, world=2)) == [2, 1]
    text = (tmp_path / "out").read_text()
    assert "not empty" in text and "process 1 stops since process 0 failed" in text
    assert "Traceback" not in text


def resume_on_own_disk(data, run):
    "Resume a run whose folder differs between the processes."
    sys.exit(main(train_command(data, f"{run}-{os.environ['RANK']}", *FILES, "--resume")))


def test_a_checkpoint_that_one_does_not_see_is_no_new_start(data, tmp_path):
    run, out = tmp_path / "run-0", tmp_path / "out"
    assert main(train_command(data, run, *FILES)) == 0
    before = (run / "state.pt").read_bytes()
    assert ended(launch(out, resume_on_own_disk, data, tmp_path / "run", world=2)) == [1, 1]
    assert "a disk that all hosts share" in out.read_text()
    assert (run / "state.pt").read_bytes() == before
    assert not (tmp_path / "run-1").exists()


# The command and the batch system

def torchrun(*args):
    "Run a verb with two processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.run([*command, "--", "iceaggr.cli", *map(str, args)], capture_output=True, text=True,
                          timeout=300)


@pytest.mark.slow
def test_the_command_under_torchrun(data, tmp_path):
    run, two, one = tmp_path / "run", tmp_path / "two.csv", tmp_path / "one.csv"
    done = torchrun(*train_command(data, run, *FILES, "--workers", "1"))
    assert done.returncode == 0 and done.stdout.count("best epoch: 1") == 1, done.stderr
    assert {p.name for p in run.iterdir()} == {
        ".lock", "best.safetensors", "curves.png", "last.safetensors", "log.csv", "settings.json", "state.pt"}
    predict = ["predict", "--run", str(run), "--data", str(data), "--device", "cpu", "--out"]
    done = torchrun(*predict, two)
    assert done.returncode == 0 and done.stdout.count("110 predictions") == 1, done.stderr
    assert main([*predict, str(one)]) == 0
    assert two.read_bytes() == one.read_bytes()


SLURM = {
    "srun": """#!/bin/bash
shift
"$@" &
echo $! > {step}
trap "kill -KILL $!; exit 137" TERM      # as srun does
wait $!
""",
    "scancel": """#!/bin/bash
if [ "$*" = "--signal=TERM $SLURM_JOB_ID" ]; then kill -TERM $(cat {step}); fi
""",
    "scontrol": """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> {requeued}; else echo localhost; fi
""",
}


@pytest.fixture
def slurm(tmp_path):
    "Environment with stand-ins for the commands of Slurm, and the file that lists jobs to requeue."
    commands, requeued = tmp_path / "bin", tmp_path / "requeued"
    commands.mkdir()
    for name, text in SLURM.items():
        text = text.replace("{step}", str(tmp_path / "step")).replace("{requeued}", str(requeued))
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="localhost", SLURM_JOB_NUM_NODES="1")
    return dict(os.environ, PATH=path, PROCESSES="2", **job), requeued


def wait_for_checkpoint(run, job, seconds=120):
    "Wait until a job has written a checkpoint or has ended."
    until = time.monotonic() + seconds
    while not (run / "state.pt").exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


@pytest.mark.slow
def test_the_slurm_script_requeues_and_resumes(data, tmp_path, slurm):
    "The job gets the signal of the time limit, asks to be requeued, and resumes when it starts again."
    (env, requeued), run = slurm, tmp_path / "run"
    script = Path(__file__).parents[1] / "data_scripts/train.sbatch"
    options = ["--epochs", "30", *FILES, "--device", "cpu", "--save-minutes", "0.001"]

    def start():
        return subprocess.Popen(["bash", script, "--data", data, "--out", run, *options], env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    job = start()
    wait_for_checkpoint(run, job)
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=120)[0]
    assert job.returncode != 0 and "resume with" in text, text
    assert requeued.read_text().split() == [str(os.getpid())]
    assert not checkpoint(run)["finished"]
    job = start()
    text = job.communicate(timeout=300)[0]
    assert job.returncode == 0 and checkpoint(run)["finished"] and len(log_of(run)) == 30, text
    assert len(requeued.read_text().split()) == 1


def test_the_slurm_script_needs_a_run(data, slurm):
    script = Path(__file__).parents[1] / "data_scripts/train.sbatch"
    done = subprocess.run(["bash", script, "--data", data], env=slurm[0], capture_output=True, text=True)
    assert done.returncode == 2 and "--out" in done.stderr
