"""Killed, interrupted and damaged runs: a resume ends with the weights of an undisturbed run."""
import dataclasses
import errno
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import time
import zipfile

import pandas as pd
import pytest
import torch
from conftest import write_tiny
from processes import ended, kill, launch

from iceaggr.cli import main
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.engine import checkpoints
from iceaggr.engine.checkpoints import CHECKPOINTS, claim_run
from iceaggr.engine.prepare import prepare
from iceaggr.geometry import Geometry, load_geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.training import TrainSettings, fit, train
from iceaggr.weights import read_weights

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 40, 2: 10})


def run_training(data, run, epochs=3, save_every_step=True, kill_at=None, full_at=None, largest=None,
                 workers=0):
    "Start or resume a run as a batch system would, with a checkpoint after each step."
    if kill_at is not None or full_at is not None: meddle(kill_at, full_at)
    if largest is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    settings = TrainSettings(epochs=epochs, batch_size=4, valid_events=10, held_out=4,
                             save_minutes=1e-9 if save_every_step else 5)
    train(data, run, TINY, [1], [2], settings, resume=True, device="cpu", workers=workers, progress=False)


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
    tensors = {}
    for which in ("model", "average", "best_weights"):
        tensors |= {f"{which}.{k}": x for k, x in state[which].items()}
    for name in ("best", "last"):
        weights = read_weights(run / f"{name}.safetensors")[1]
        tensors |= {f"{name}.{k}": x for k, x in weights.items()}
    log = pd.read_csv(run / "log.csv").drop(columns=["minutes", "events_per_s"])
    return tensors, log, sorted(p.name for p in run.iterdir())


def same(run, expected):
    tensors, log, files = result(run)
    assert tensors.keys() == expected[0].keys()
    assert all(torch.equal(x, expected[0][k]) for k, x in tensors.items())
    pd.testing.assert_frame_equal(log, expected[1], check_exact=True)
    assert files == expected[2]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    "What a run gives that nothing happens to; it saves after its epochs only."
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training(data, run, save_every_step=False)
    return result(run)


def test_one_process_trains_a_run(data, tmp_path):
    "A second one that would resume it is refused and leaves the first alone, until that is killed."
    run, output = tmp_path / "run", tmp_path / "output"
    first = launch(output, run_training, data, run, epochs=400, workers=1, daemon=False)
    while not (run / "state.pt").exists() and first[0].is_alive(): time.sleep(0.05)
    (run / ".log.csv.part1").touch()
    with pytest.raises(ValueError, match="is being trained by another process"):
        run_training(data, run, epochs=400)
    assert (run / ".log.csv.part1").exists() and kill(first)
    claim_run(run, json.loads((run / "settings.json").read_text()), True).close()


def test_class_that_moved_to_another_module_resumes(tmp_path):
    "A class of a notebook (__main__) is put into a module; another class is another run."
    def facts(name): return dict(parts=dict(model={"class": "iceaggr.model.A"}, pool={"class": name}))

    run = tmp_path / "run"
    claim_run(run, facts("__main__.MaxPool"), False).close()
    claim_run(run, facts("poolings.MaxPool"), True).close()
    with pytest.raises(ValueError, match="parts.pool.* -> "): claim_run(run, facts("__main__.MinPool"), True)


def test_reading_the_settings_keeps_the_lock(tmp_path):
    "POSIX frees the locks that a process has on a file when it closes any descriptor of that file."
    run, output = tmp_path / "run", tmp_path / "output"
    with claim_run(run, dict(seed=1), False):
        json.loads((run / "settings.json").read_text())
        assert ended(launch(output, claim_run, run, dict(seed=1), True)) == [1]
        assert "is being trained by another process" in output.read_text()
    claim_run(run, dict(seed=1), True).close()


def test_of_two_claims_at_once_one_is_refused(tmp_path, monkeypatch):
    "While the first writes its settings, and before the second has looked at the folder again."
    def refused(error): return pytest.raises(error, match="another process|not empty")

    rename, lock = os.replace, checkpoints._lock
    def replace(*args):
        monkeypatch.setattr(os, "replace", rename)
        with refused(ValueError): claim_run(tmp_path / "run", dict(seed=2), False)
        rename(*args)

    monkeypatch.setattr(os, "replace", replace)
    claim_run(tmp_path / "run", dict(seed=1), False).close()
    assert json.loads((tmp_path / "run/settings.json").read_text()) == dict(seed=1)

    def lock_late(*args):
        monkeypatch.setattr(checkpoints, "_lock", lock)
        claim_run(tmp_path / "late", dict(seed=1), False).close()
        lock(*args)

    monkeypatch.setattr(checkpoints, "_lock", lock_late)
    with refused(FileExistsError): claim_run(tmp_path / "late", dict(seed=2), False)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, monkeypatch, error):
    "A run goes on without one."
    def flock(*args): raise OSError(error, os.strerror(error))
    monkeypatch.setattr("fcntl.flock", flock)
    with claim_run(tmp_path / "run", dict(seed=1), False): pass
    with claim_run(tmp_path / "run", dict(seed=1), True): pass


def test_resume_starts_a_run_that_is_not_there(data, tmp_path, capsys):
    "As a job needs it that is requeued with the command of its first start."
    run, other = tmp_path / "run", tmp_path / "other"
    run_training(data, run, epochs=1, save_every_step=False)
    assert f"{run} has no checkpoint yet: the run starts" in capsys.readouterr().out
    run_training(data, run, epochs=1, save_every_step=False)
    assert "the run starts" not in capsys.readouterr().out
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"): run_training(data, other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def kills(data, folder, expected, wanted, seed=0):
    "Kill runs after random times and resume them until they end; returns counts of kills and of runs."
    draw, output = random.Random(seed), folder / "output"
    told = dict(kills=0, before_the_first_checkpoint=0, during_a_write=0, runs=0)
    ended(launch(output, print))                                        # the server has started
    start = time.monotonic()
    assert ended(launch(output, run_training, data, folder / "whole")) == [0], output.read_text()
    longest = time.monotonic() - start
    while told["kills"] < wanted:
        run = folder / f"run{told['runs']}"
        while True:
            processes = launch(output, run_training, data, run)
            if told["kills"] < wanted:
                time.sleep(draw.uniform(0, longest))
                if kill(processes):
                    told["kills"] += 1
                    told["before_the_first_checkpoint"] += not (run / "state.pt").exists()
                    told["during_a_write"] += any(run.glob(".*.part*"))
                    continue
            assert ended(processes) == [0], output.read_text()
            break
        same(run, expected)
        told["runs"] += 1
    return told


@pytest.mark.slow
def test_killed_at_random(data, undisturbed, tmp_path):
    assert kills(data, tmp_path, undisturbed, 3)["kills"] == 3


@pytest.mark.slow
def test_killed_fifty_times_at_random(data, undisturbed, tmp_path):
    told = kills(data, tmp_path, undisturbed, 50, seed=1)
    print(told)
    assert told["kills"] == 50


def test_killed_around_each_rename(data, undisturbed, tmp_path):
    "Between any two files of a checkpoint; each process goes a little further than the one before."
    run, output = tmp_path / "run", tmp_path / "output"
    for kill_at in range(12):
        killed = ended(launch(output, run_training, data, run, kill_at=kill_at))
        assert killed == [-signal.SIGKILL], output.read_text()
    assert ended(launch(output, run_training, data, run)) == [0], output.read_text()
    same(run, undisturbed)


def test_full_disk(data, undisturbed, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    assert ended(launch(output, run_training, data, run, full_at=4)) == [1]
    step = torch.load(run / "state.pt", weights_only=True)["step"]
    message = output.read_text()
    assert "No space left on device" in message and "--resume" in message and step == 4
    assert not list(run.glob(".*.part*"))          # no part of a file is left
    assert ended(launch(output, run_training, data, run, largest=100_000)) == [1]
    assert "File too large" in output.read_text()
    assert torch.load(run / "state.pt", weights_only=True)["step"] == step
    assert ended(launch(output, run_training, data, run)) == [0], output.read_text()
    same(run, undisturbed)


def test_folder_that_cannot_be_written(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    args = ["train", "--data", str(data), "--train-batches", "1", "--valid-batches", "2", "--epochs", "1",
            "--device", "cpu", "--out"]
    assert main([*args, str(tmp_path / "file/run")]) == 2
    assert f"{tmp_path / 'file'} is a file: choose a folder" in capsys.readouterr().err

    def refuse(*args): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])
    monkeypatch.setattr(os, "fsync", refuse)
    assert main([*args, str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "cannot be written" in told and "Permission denied" in told and "Traceback" not in told


def records(archive): # what is read of a checkpoint; None: nothing
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as z: return {name: z.read(name) for name in z.namelist()}
    except Exception: return None


def test_damaged_checkpoint(data, undisturbed, tmp_path):
    "A truncated or altered checkpoint is refused; the run continues from the one before and ends the same."
    run, output, draw = tmp_path / "run", tmp_path / "output", random.Random(0)
    assert ended(launch(output, run_training, data, run, full_at=6)) == [1]
    whole = (run / "state.pt").read_bytes()
    def step(): return torch.load(run / "state.pt", weights_only=True)["step"]
    for cut in (True, False):
        last, good = step(), (run / "state.pt").read_bytes()
        damaged = good
        while records(damaged) == records(good):
            place = draw.randrange(len(whole))
            damaged = good[:place]
            if not cut: damaged += bytes([good[place] ^ 1]) + good[place + 1:]
        (run / "state.pt").write_bytes(damaged)
        before = torch.load(run / "state.previous.pt", weights_only=True)["step"]
        assert ended(launch(output, run_training, data, run, full_at=3)) == [1]
        assert before <= last and before < step()
        assert f"going on from the checkpoint before it, step {before}" in output.read_text()
    assert ended(launch(output, run_training, data, run)) == [0], output.read_text()
    same(run, undisturbed)
    for name in CHECKPOINTS: (run / name).write_bytes(b"")
    assert ended(launch(output, run_training, data, run)) == [1] and "--init" in output.read_text()


def test_interrupted_with_another_optimiser_and_clock(data, tmp_path):
    "With a clock that advances by a second per reading, a run and its resume end at the same time."
    class Clock:
        now = 0.
        def __call__(self):
            self.now += 1.
            return self.now
    def short(run, resume=False, stop_at=None):
        class Interrupting(IceCubeDataset):
            reads = 0
            def hits(self, indices):
                self.reads += 1
                if self.reads == stop_at: signal.raise_signal(signal.SIGTERM)
                return super().hits(indices)
        ds = Interrupting(data, batch_ids=[1])
        model = HierarchicalTransformer(TINY, ds.geometry)
        optimizer = torch.optim.AdamW(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        settings = TrainSettings(minutes=1., batch_size=4, held_out=4)
        log = fit(model, ds, IceCubeDataset(data, batch_ids=[2]), run, settings, resume, progress=False,
                  optimizer=optimizer, clock=Clock())
        pairs = zip(before, model.parameters(), strict=True)
        assert optimizer.state and not all(torch.equal(a, b) for a, b in pairs)
        return log
    for name in ("one", "two"): (tmp_path / name).mkdir()
    log = short(tmp_path / "one")
    assert 10 < log.step.iloc[-1] < 30 and 1. <= log.minutes.iloc[-1] < 1.1
    assert log.lr.iloc[-1] < 0.05 * TrainSettings.lr
    stored = torch.load(tmp_path / "one/state.pt", weights_only=True)["optimizer"]
    assert "state" in stored                                                   # AdamW's own, not MuonAdamW's
    assert short(tmp_path / "two", stop_at=12).attrs["interrupted"]
    log = short(tmp_path / "two", resume=True)
    assert 1. <= log.minutes.iloc[-1] < 1.1 and not log.attrs["interrupted"]


def test_a_run_without_matplotlib(data, tmp_path, monkeypatch):
    "GPU machines may lack it: the weights and the log are there, the curves are not."
    find = importlib.util.find_spec
    def find_others(name, *rest): return None if name == "matplotlib" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    run, other = tmp_path / "run", tmp_path / "other"
    run_training(data, run, epochs=1)
    assert (run / "best.safetensors").exists() and len(pd.read_csv(run / "log.csv")) == 1
    assert not (run / "curves.png").exists()
    monkeypatch.undo()
    run_training(data, other, epochs=1)
    assert (other / "curves.png").exists()


def test_a_refused_command_leaves_a_living_run_alone(tmp_path):
    "Of a file that is being written only a resume may think that its process was killed."
    claim_run(tmp_path / "run", dict(seed=1), False).close()
    part = tmp_path / "run/.state.pt.part123"
    part.touch()
    with pytest.raises(FileExistsError, match="--resume"): claim_run(tmp_path / "run", dict(seed=1), False)
    with pytest.raises(ValueError, match="seed: 1 -> 2"): claim_run(tmp_path / "run", dict(seed=2), True)
    assert part.exists()
    claim_run(tmp_path / "run", dict(seed=1), True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "settings.json"}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/.settings.json.part123").touch()                    # killed at its very start
    claim_run(tmp_path / "killed", dict(seed=1), False)
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {".lock", "settings.json"}


def test_a_resume_with_other_events_is_refused(data, tmp_path):
    "As many, in files of the same numbers: the events kept back would be others."
    settings = TrainSettings(epochs=1, batch_size=4, valid_events=10, held_out=4)
    train(data, tmp_path / "run", TINY, [1], [2], settings, device="cpu", progress=False)
    other = write_tiny(tmp_path / "other", {1: 40, 2: 10})
    path = other / "train_meta.parquet"
    meta = pd.read_parquet(path)
    meta.assign(azimuth=meta.azimuth.where(meta.batch_id != 1, 1.0)).to_parquet(path)

    def resume(folder, settings):
        return train(folder, tmp_path / "run", TINY, [1], [2], settings, resume=True, device="cpu",
                     progress=False)

    with pytest.raises(ValueError, match="train.lr"): resume(data, dataclasses.replace(settings, lr=1.))
    resume(data, dataclasses.replace(settings, graph_pulses=99))               # changes only the memory
    with pytest.raises(ValueError, match="train_checksum"): resume(other, settings)
    for changed in same_events_with_others(data, tmp_path):
        with pytest.raises(ValueError, match="train_checksum"): resume(changed, settings)
    prepare(data, tmp_path / "prepared", progress=False)
    assert len(resume(tmp_path / "prepared", settings)) == 1       # the other form of the same data


@pytest.mark.parametrize("content", [[1], dict(a=1), "step", "log", "version"])
def test_checkpoint_of_other_content_is_refused(tmp_path, content):
    "Whatever torch can read; a value of another type as well."
    if isinstance(content, str): content = checkpoints.new_state() | {content: "x" if content != "log" else 3}
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another version"): checkpoints.read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "state.pt"])
def test_pipe_in_place_of_a_file_of_the_run(tmp_path, name):
    "Whoever opens it to read waits for a writer."
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        claim_run(tmp_path, dict(seed=1), True).close()


def same_events_with_others(data, folder): # yields folders
    "The same ids, sizes and directions, with other charges, sensors and efficiencies."
    for column, change in (("charge", lambda x: 2 * x), ("sensor_id", lambda x: 5159 - x)):
        shutil.copytree(data, folder / column)
        for path in (folder / column / "train").iterdir():
            pulses = pd.read_parquet(path)
            pulses.assign(**{column: change(pulses[column])}).to_parquet(path)
        yield folder / column
    shutil.copytree(data, folder / "geometry")
    geometry = load_geometry()
    Geometry(geometry.xyz, 0.9 * geometry.efficiency).to_csv(folder / "geometry/sensor_geometry.csv")
    yield folder / "geometry"


@pytest.mark.parametrize("text", ["", "[1]", None])
def test_lost_settings_are_taken_from_the_checkpoint(data, tmp_path, text):
    "An emptied settings.json beside whole checkpoints; other settings are refused as before."
    settings = TrainSettings(epochs=1, batch_size=4, valid_events=10, held_out=4)
    run = tmp_path / "run"
    def start(settings):
        train(data, run, TINY, [1], [2], settings, resume=True, device="cpu", progress=False)

    start(settings)
    path = run / "settings.json"
    before = path.read_text()
    if text is None: path.unlink()
    else: path.write_text(text)
    with pytest.raises(ValueError, match="train.lr"): start(dataclasses.replace(settings, lr=1.))
    start(settings)
    assert json.loads(path.read_text()) == json.loads(before)
    path.write_text("")
    for name in CHECKPOINTS: (run / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="settings.json cannot be read"): start(settings)


def test_settings_emptied_during_a_run_are_kept_in_later_checkpoints(tmp_path):
    "Both checkpoints are written after that."
    model = HierarchicalTransformer(TINY)
    optimizer, state = torch.optim.AdamW(model.parameters()), checkpoints.new_state()
    claim_run(tmp_path / "run", dict(seed=1), False).close()
    for step in range(4):
        if step == 1: (tmp_path / "run/settings.json").write_text("")
        checkpoints.save_state(tmp_path / "run", state, model, model, optimizer)
    for name in CHECKPOINTS:
        assert torch.load(tmp_path / "run" / name, weights_only=True)["settings"] == dict(seed=1)
    claim_run(tmp_path / "run", dict(seed=1), True).close()
    assert json.loads((tmp_path / "run/settings.json").read_text()) == dict(seed=1)


def test_initial_weights_are_known_by_their_full_path(data, tmp_path, monkeypatch):
    "The same file by another path may be resumed, another file of the same name may not."
    settings = TrainSettings(epochs=1, batch_size=4, valid_events=10, held_out=4)
    for folder in ("a", "b"):
        HierarchicalTransformer(TINY, load_geometry()).save(tmp_path / folder / "first.safetensors")
    def start(folder, init):
        monkeypatch.chdir(tmp_path / folder)
        train(data, tmp_path / "run", TINY, [1], [2], settings, init, resume=True, device="cpu",
              progress=False)

    start("a", "first.safetensors")
    start("b", "../a/first.safetensors")
    with pytest.raises(ValueError, match="init: "): start("b", "first.safetensors")


def test_an_epoch_without_a_finite_error_is_not_the_best(data, tmp_path, monkeypatch):
    "Nothing is smaller than NaN; and who is told to start again is not sent to weights that are NaN."
    errors = iter([float("nan"), 40.0, 41.0])
    def validated(model, dataset, indices=None, precision="float32"):
        e = 1.0 if indices is None else next(errors)
        return dict(loss=e, mean_degrees=e, median_degrees=e)
    monkeypatch.setattr("iceaggr.training.validate", validated)
    settings, saved = TrainSettings(epochs=3, batch_size=4, valid_events=10, held_out=4), []
    def copy_weights(average):
        saved.append(1)
        return {k: x.clone() for k, x in average.state_dict().items()}
    monkeypatch.setattr("iceaggr.training._copy_weights", copy_weights)
    train(data, tmp_path / "run", TINY, [1], [2], settings, device="cpu", progress=False)
    assert len(saved) == 2                           # the second, and the second calibrated
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["best"] == 40
    errors = iter([float("nan")])
    monkeypatch.setattr("iceaggr.training.vmf_loss", lambda vector, *more: vector.sum() * float("nan"))
    with pytest.raises(FloatingPointError) as refused:
        train(data, tmp_path / "lost", TINY, [1], [2], settings, device="cpu", progress=False)
    assert "--init" not in str(refused.value) and "lower learning rate" in str(refused.value)
