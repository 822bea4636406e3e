"""The command as a user runs it: processes of its own, exit codes, interruption and resume."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import iceaggr.data
from iceaggr.cli import find_event
from iceaggr.data import IceCubeDataset
from iceaggr.engine.prepare import prepare
from iceaggr.geometry import Geometry, load_geometry
from iceaggr.model import read_weights
from iceaggr.common import DataError
from iceaggr.simulation.dataset import simulate_dataset
from processes import call, ended, launch, run_command


def weights(run):
    return load_file(run / "last.safetensors")


@pytest.mark.parametrize("verb", ["simulate", "prepare", "train", "predict", "evaluate", "display", "bench"])
def test_help(verb):
    done = subprocess.run([sys.executable, "-m", "iceaggr.cli", verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: iceaggr " + verb)


def test_train_predict_evaluate_from_either_form(tiny_dataset, tmp_path):
    assert call("prepare", "--data", tiny_dataset, "--out", tmp_path / "prepared", "--check").returncode == 0
    tables = []
    for form in (tiny_dataset, tmp_path / "prepared"):
        run = tmp_path / f"run-{form.name}"
        done = call("train", "--data", form, "--out", run, "--epochs", 1, "--batch-size", 4, "--train-batches", "2,3", "--valid-batches", 10)
        assert done.returncode == 0, done.stderr
        assert ("little better than guessing" in done.stdout) == (pd.read_csv(run / "log.csv").held_out_mean_degrees.min() > 80)
        settings = json.loads((run / "settings.json").read_text())
        assert settings["train_batches"] == [2, 3] and settings["valid_batches"] == [10] and settings["train"]["batch_size"] == 4
        done = call("predict", "--run", run, "--data", form, "--batches", 10, "--out", run / "p.parquet")
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_parquet(run / "p.parquet"))
        assert tables[-1].event_id.tolist() == [10_000 + 3 * i for i in range(7)]
    pd.testing.assert_frame_equal(*tables)                              # the same batches, the same weights, the same predictions
    done = call("evaluate", "--predictions", run / "p.parquet", "--data", tiny_dataset, "--out", tmp_path / "report")
    assert done.returncode == 0 and json.loads((tmp_path / "report/metrics.json").read_text())["n_events"] == 7, done.stderr


def test_training_starts_from_other_weights(tiny_dataset, tmp_path):
    args = ["train", "--data", tiny_dataset, "--epochs", 1, "--batch-size", 4, "--train-batches", "2,3", "--valid-batches", 10]
    assert call(*args, "--out", tmp_path / "first").returncode == 0
    first = read_weights(tmp_path / "first")[1]
    done = call(*args, "--out", tmp_path / "second", "--init", tmp_path / "first", "--lr", 1e-12)
    assert done.returncode == 0, done.stderr
    for name, x in read_weights(tmp_path / "second")[1].items():
        if name != "t2.calibration": torch.testing.assert_close(x, first[name], atol=1e-6, rtol=1e-4, msg=name)      # hardly moved from there
    shutil.rmtree(tmp_path / "first")                                   # a resume has its own state
    assert call(*args, "--out", tmp_path / "second", "--init", tmp_path / "first", "--lr", 1e-12, "--resume").returncode == 0
    done = call(*args, "--out", tmp_path / "third", "--init", tmp_path / "nothing")
    assert done.returncode == 1 and "no weights at" in done.stderr


def test_training_learns_from_a_teacher(tiny_dataset, tmp_path):
    "One that knows the truth teaches what the truth teaches; one that does not teaches something else; a resume keeps to its teacher, wherever the file is now."
    args = ["train", "--data", tiny_dataset, "--epochs", 1, "--batch-size", 4, "--train-batches", "2,3", "--valid-batches", 10]
    truth = pd.read_parquet(tiny_dataset / "train_meta.parquet").query("batch_id != 10")[["event_id", "azimuth", "zenith"]]
    truth.assign(kappa=1e12).to_parquet(tmp_path / "truth.parquet")
    truth.assign(kappa=1e12, zenith=3.14 - truth.zenith).to_csv(tmp_path / "wrong.csv", index=False)
    for out, teachers in {"plain": (), "right": ("--teacher", tmp_path / "truth.parquet", tmp_path / "truth.parquet"), "wrong": ("--teacher", tmp_path / "wrong.csv", "--teacher-share", 1)}.items():
        done = call(*args, "--out", tmp_path / out, *teachers)
        assert done.returncode == 0, done.stderr
    plain, right, wrong = (weights(tmp_path / out) for out in ("plain", "right", "wrong"))
    for name, x in plain.items(): torch.testing.assert_close(right[name], x, atol=1e-4, rtol=1e-3, msg=name)
    assert max(float((wrong[name] - x).abs().max()) for name, x in plain.items()) > 1e-3
    shutil.move(tmp_path / "wrong.csv", tmp_path / "moved.csv")
    again = [*args, "--out", tmp_path / "wrong", "--resume", "--teacher-share", 1, "--teacher"]
    assert call(*again, tmp_path / "moved.csv").returncode == 0
    done = call(*again, tmp_path / "truth.parquet")
    assert done.returncode and "teacher_checksum" in done.stderr, done.stderr
    truth[1:].assign(kappa=1.).to_parquet(tmp_path / "few.parquet")
    done = call(*args, "--out", tmp_path / "few", "--teacher", tmp_path / "few.parquet")
    assert done.returncode == 1 and "few.parquet" in done.stderr and f"{truth.event_id.iloc[0]}" in done.stderr and not (tmp_path / "few").exists()
    assert call(*args, "--out", tmp_path / "few", "--teacher", tmp_path / "truth.parquet", "--teacher-share", 2).returncode == 2
    done = call(*args, "--out", tmp_path / "few", "--teacher-share", 0.5)
    assert done.returncode == 2 and "needs --teacher" in done.stderr, done.stderr


def test_too_few_events_to_keep_any_back(tiny_dataset, tmp_path):
    done = call("train", "--data", tiny_dataset, "--out", tmp_path / "run", "--epochs", 1, "--train-batches", "2", "--valid-batches", 10)
    assert done.returncode == 1 and "too few" in done.stderr, done.stderr


def test_simulation_takes_what_to_simulate(tmp_path):
    done = call("simulate", "--events", 40, "--out", tmp_path / "data", "--double-cascades", 0.3, "--bundles", 0.4, "--directions", "atmospheric", "--saturation", "--dead-doms", 0)
    assert done.returncode == 0, done.stderr
    assert {"double_cascade", "muon_bundle"} < set(pd.read_parquet(tmp_path / "data/truth.parquet").type)
    assert json.loads((tmp_path / "data/simulation.json").read_text())["dead_doms"] == 0
    assert call("simulate", "--events", 40, "--out", tmp_path / "none", "--bundles", 2).returncode == 2 and not (tmp_path / "none").exists()


def test_interrupted_training_resumes_to_the_same_weights(tiny_dataset, tmp_path):
    args = ["train", "--data", tiny_dataset, "--epochs", 16, "--batch-size", 2, "--train-batches", "2,3", "--valid-batches", 10]
    assert call(*args, "--out", tmp_path / "whole").returncode == 0
    process, = launch(tmp_path / "said", run_command, [*map(str, args), "--out", str(tmp_path / "cut")])
    until = time.monotonic() + 120
    while not (tmp_path / "cut/state.pt").exists() and process.is_alive() and time.monotonic() < until: time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    said = lambda: (tmp_path / "said").read_text()
    assert ended([process]) == [130] and "--resume" in said(), said()
    assert len(pd.read_csv(tmp_path / "cut/log.csv")) < 16              # it was interrupted
    refused = call(*args, "--out", tmp_path / "cut")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = call(*args, "--out", tmp_path / "cut", "--resume")
    assert done.returncode == 0, done.stderr
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all((whole[k] == cut[k]).all() for k in whole)
    assert len(pd.read_csv(tmp_path / "cut/log.csv")) == 16
    assert not [p for p in (tmp_path / "cut").iterdir() if "part" in p.name]


def test_another_detector_is_refused(tiny_dataset, tmp_path):
    run = tmp_path / "run"
    assert call("train", "--data", tiny_dataset, "--out", run, "--epochs", 1).returncode == 0
    from iceaggr.geometry import Geometry
    Geometry.nominal().to_csv(tiny_dataset / "sensor_geometry.csv")
    table = pd.read_csv(tiny_dataset / "sensor_geometry.csv")
    table.assign(x=table.x + 1.5).to_csv(tiny_dataset / "sensor_geometry.csv", index=False)
    done = call("predict", "--run", run, "--data", tiny_dataset, "--out", tmp_path / "p.csv")
    assert done.returncode == 1 and "1.5 m" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "p.csv").exists()


def test_display_takes_what_predict_wrote(tiny_dataset, tmp_path):
    "Gaps of other events, none for this one, and a kappa of zero."
    ids = pd.read_parquet(tiny_dataset / "train_meta.parquet").event_id
    p = pd.DataFrame(dict(event_id=ids, azimuth=1.0, zenith=1.0, kappa=0.0))
    p.loc[p.index[-1], ["azimuth", "zenith", "kappa"]] = float("nan")
    p.to_parquet(tmp_path / "p.parquet")
    for event, said in ((ids.iloc[0], ""), (ids.iloc[-1], f"p.parquet has no prediction of event {ids.iloc[-1]}")):
        done = call("display", "--data", tiny_dataset, "--event", event, "--predictions", tmp_path / "p.parquet", "--out", tmp_path / "event.html")
        assert done.returncode == 0 and said in done.stdout and bool(said) == ("no prediction" in done.stdout), done.stderr
        page = (tmp_path / "event.html").read_text()
        assert ("path predicted" in page) == (not said) == bool(re.search(r" pulses, [\d.]+(°|\\u00b0) off", page))


def test_one_event_needs_one_file(tiny_dataset, tmp_path, monkeypatch):
    "Of both forms of a data set; one that is not there is said to be missing."
    prepared, read = prepare(tiny_dataset, tmp_path / "prepared", progress=False), []
    events = iceaggr.data.read_prepared_events
    monkeypatch.setattr("iceaggr.data.read_prepared_events", lambda path, batch_id, *args: read.append(batch_id) or events(path, batch_id, *args))
    for data in (tiny_dataset, prepared):
        dataset, row = find_event(data, "train", 3006)
        assert len(dataset) == 1 and (dataset.event_ids[0], row.event_id, row.batch_id) == (3006, 3006, 3)
    assert read == [3]
    for data in (tiny_dataset, prepared):
        with pytest.raises(DataError, match="3007"): find_event(data, "train", 3007)
        with pytest.raises(DataError, match="event 3006 is in none of the files"): find_event(data, "train", 3006, [2])
        assert find_event(data, "train", "brightest", [3])[1].batch_id == 3


def test_bad_events_and_displays(tiny_dataset, tmp_path):
    "A bad event is no obstacle to drawing another one; that it is bad is said, whatever the form."
    path, meta = tiny_dataset / "train/batch_10.parquet", pd.read_parquet(tiny_dataset / "train_meta.parquet")
    meta = meta[meta.batch_id == 10].assign(n=lambda t: t.last_pulse_index - t.first_pulse_index + 1).sort_values("n")
    least, second, most = meta.iloc[[0, -2, -1]].itertuples()
    table = pd.read_parquet(path)
    def spoil(*events):
        t = table.reset_index()
        t.loc[[e.first_pulse_index for e in events], "charge"] = 0.
        t.set_index("event_id").to_parquet(path)
    spoil(least)
    dataset, row = find_event(tiny_dataset, "train", "brightest")
    assert row.event_id == most.event_id and dataset[0]["n_pulses"] == most.n
    spoil(least, most)
    dataset, _ = find_event(tiny_dataset, "train", "brightest")
    with pytest.raises(DataError, match=f"event {most.event_id}: 0.0 is not"): dataset[0]
    with pytest.warns(UserWarning, match="left out"): assert find_event(tiny_dataset, "train", "brightest", None, "skip")[1].event_id == second.event_id
    with pytest.warns(UserWarning, match="left out"): prepared = prepare(tiny_dataset, tmp_path / "prepared", [10], progress=False, on_bad_event="skip")
    for data in (tiny_dataset, prepared):
        with pytest.warns(UserWarning), pytest.raises(DataError, match=f"event {least.event_id} was left out, as .*: column charge: 0.0 is not"): find_event(data, "train", int(least.event_id), [10], "skip")
    spoil(*meta.itertuples())
    with pytest.warns(UserWarning), pytest.raises(DataError, match="file 10 has no good event"): find_event(tiny_dataset, "train", "brightest", None, "skip")


def test_home(tiny_dataset, tmp_path):
    "The shell leaves the ~ of --out=~/x alone."
    done = subprocess.run([sys.executable, "-m", "iceaggr.cli", "display", f"--data={tiny_dataset}", "--event=brightest", "--out=~/event.png"], env={**os.environ, "HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and [p.name for p in tmp_path.glob("*.png")] == ["event.png"] and not (tmp_path / "~").exists(), done.stderr


def test_data_are_not_written_over(tiny_dataset, tmp_path):
    "Neither by predictions, nor by the prepared form of another data set."
    files = lambda folder: {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    prepared, link = tmp_path / "prepared", tmp_path / "link"
    assert call("prepare", "--data", tiny_dataset, "--out", prepared).returncode == 0
    link.mkdir(), (link / "train").symlink_to(tiny_dataset / "train"), (link / "train_meta.parquet").symlink_to(tiny_dataset / "train_meta.parquet")
    before = files(tiny_dataset), files(prepared)
    for data, name in ((tiny_dataset, "train_meta.parquet"), (tiny_dataset, "train/batch_2.parquet"), (tiny_dataset, "train/new.csv"), (link, "train/batch_2.parquet"), (link, "train_meta.parquet"), (prepared, "truth.parquet")):
        done = call("predict", "--data", data, "--run", "small", "--out", data / name)
        assert done.returncode == 2 and f"{data / name}: this is a file of the data set" in done.stderr, done.stderr
    for args in (("predict", "--run", "small", "--out", prepared / "p.csv"), ("evaluate", "--predictions", tmp_path / "p.csv", "--out", prepared)):      # its list of bad events
        done = call(*args, "--data", prepared, "--on-bad-event", "skip")
        assert done.returncode == 2 and "skipped.csv: this is a file" in done.stderr, done.stderr
    run = tmp_path / "run"
    run.mkdir(), (run / "settings.json").touch()
    for name, more in (("log.csv", ()), ("p.csv", ("--on-bad-event", "skip"))):
        done = call("predict", "--data", tiny_dataset, "--run", "small", "--out", run / name, *more)
        assert done.returncode == 2 and "this is a file of the run" in done.stderr and [p.name for p in run.iterdir()] == ["settings.json"], done.stderr
    done = call("prepare", "--data", link, "--out", tiny_dataset)
    assert done.returncode == 1 and "has files of a data set in the Kaggle layout" in done.stderr, done.stderr
    done = call("bench", "--data", tiny_dataset, "--out", tiny_dataset / "train_meta.parquet")
    assert done.returncode == 2 and ".json" in done.stderr
    assert before == (files(tiny_dataset), files(prepared)) and (link / "train_meta.parquet").is_symlink()


def test_prepared_form_of_another_data_set_stays(tmp_path):
    "Simulated data sets have the same numbers of events; one whose meta table is mended is the same."
    one, two = (simulate_dataset(tmp_path / str(seed), 40, seed=seed, events_per_file=20, progress=False) for seed in (1, 2))
    prepare(one, tmp_path / "out", progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    done = call("prepare", "--data", two, "--out", tmp_path / "out")
    assert done.returncode == 1 and "batch_1.events.arrow: was prepared from another data set; event 0 is not what it is in" in done.stderr, done.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    prepare(one, tmp_path / "part", [1], progress=False)
    with pytest.raises(DataError, match="truth.parquet: is not that of .*, but train/batch_1.events.arrow was prepared with it"): prepare(two, tmp_path / "part", [2], progress=False)
    (two / "test").mkdir()
    shutil.copy(two / "train/batch_1.parquet", two / "test")
    meta = pd.read_parquet(two / "train_meta.parquet")
    meta[meta.batch_id == 1].drop(columns=["azimuth", "zenith"]).to_parquet(two / "test_meta.parquet", index=False)
    with pytest.raises(DataError, match="truth.parquet: is not that of"): prepare(two, tmp_path / "part", split="test", progress=False)
    (two / "truth.parquet").unlink()
    moved, nominal = load_geometry(two), (two / "sensor_geometry.csv").read_bytes()
    Geometry(moved.xyz + [100., 0, 0]).to_csv(two / "sensor_geometry.csv")
    with pytest.raises(DataError, match="sensor_geometry.csv: is not that of"): prepare(two, tmp_path / "part", split="test", progress=False)
    (tmp_path / "part/sensor_geometry.csv").unlink()
    with pytest.raises(DataError, match="sensor_geometry.csv: is not that of"): prepare(two, tmp_path / "part", split="test", progress=False)      # the nominal sensors
    (two / "sensor_geometry.csv").write_bytes(nominal)
    assert len(IceCubeDataset(prepare(two, tmp_path / "part", split="test", progress=False), "test")) == 20
    meta = pd.read_parquet(one / "train_meta.parquet")
    pd.concat([meta, meta[:1]]).to_parquet(one / "train_meta.parquet", index=False)
    with pytest.raises(DataError, match="lies inside the range of another event"): prepare(one, tmp_path / "out", progress=False)
    meta[meta.event_id != 3].to_parquet(one / "train_meta.parquet", index=False)
    assert len(IceCubeDataset(prepare(one, tmp_path / "out", progress=False))) == 39


def test_what_display_can_write(tiny_dataset, tmp_path):
    for out, more, said in (("e.jpg", (), ".png"), ("e.png", ("--animate",), "--animate"), ("train_meta.parquet/e.png", (), "is a file")):
        done = call("display", "--data", tiny_dataset, "--event", "brightest", "--out", (tiny_dataset if "/" in out else tmp_path) / out, *more)
        assert done.returncode == 2 and said in done.stderr and not list(tmp_path.glob("e.*")), done.stderr


def test_defaults_are_said_once():
    from iceaggr.cli import make_parser
    for verb in make_parser()._subparsers._group_actions[0].choices.values():
        for action in verb._actions:
            text = verb._get_formatter()._expand_help(action) if action.help else ""
            assert "None" not in text and text.count("default") <= 1 + 2 * (action.dest == "mix"), text
            if action.default not in (None, "==SUPPRESS==") and action.default is not False: assert "default" in text, (verb.prog, action.dest)


def test_bad_data_is_named_without_traceback(tiny_dataset, tmp_path):
    path = tiny_dataset / "train/batch_3.parquet"
    table = pd.read_parquet(path)
    table.iloc[4, table.columns.get_loc("charge")] = float("nan")
    table.to_parquet(path)
    done = call("train", "--data", tiny_dataset, "--out", tmp_path / "run", "--epochs", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("batch_3.parquet", "charge", "3000"))
    done = call("train", "--data", tiny_dataset, "--out", tmp_path / "other", "--epochs", 1, "--workers", 1)     # the same from a process that loads
    assert done.returncode == 1 and "Traceback" not in done.stderr and "batch_3.parquet" in done.stderr


def test_core_modules_need_only_the_core_packages():
    script = """
import sys
for name in ("plotly", "matplotlib", "ipywidgets", "scipy", "sklearn", "fastcore", "nbdev", "IPython"): sys.modules[name] = None
import iceaggr.training, iceaggr.model, iceaggr.evaluation, iceaggr.display, iceaggr.simulation.dataset, iceaggr.studies.comparison, iceaggr.studies.baselines, iceaggr.benchmark, iceaggr.cli
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
