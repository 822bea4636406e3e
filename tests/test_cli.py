"""The command as a user runs it: processes of its own, exit codes, interruption and resume."""
import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from processes import call, ended, launch, run_command
from safetensors.torch import load_file

import iceaggr.data
from iceaggr.cli import _report_training, batch_numbers, find_event, main, make_parser
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.engine.prepare import prepare
from iceaggr.geometry import Geometry, load_geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.training import _EPOCH_HEAD, _describe_epoch
from iceaggr.weights import read_weights

VERBS = ["simulate", "prepare", "train", "predict", "evaluate", "display", "bench"]
SHORT_RUN = ["--epochs", 1, "--batch-size", 4, "--train-batches", "2,3", "--valid-batches", 10]


def last_weights(run):
    return load_file(run / "last.safetensors")


def files_of(folder):
    "Every file and what it holds."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- help and arguments


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb):
    command = [sys.executable, "-m", "iceaggr.cli", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: iceaggr {verb}")


def test_the_bare_command_prints_its_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.out == make_parser().format_help() and not shown.err


def test_defaults_are_named_once():
    for verb in make_parser()._subparsers._group_actions[0].choices.values():
        for action in verb._actions:
            text = verb._get_formatter()._expand_help(action) if action.help else ""
            assert "None" not in text and text.count("default") <= 1 + 2 * (action.dest == "mix"), text
            has_default = action.default not in (None, "==SUPPRESS==") and action.default is not False
            if has_default: assert "default" in text, (verb.prog, action.dest)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "3-", "-1", "8-5"])
def test_numbers_of_files(text):
    assert batch_numbers("7") == [7]
    done = call("prepare", "--data", "x", "--out", "y", f"--batches={text}")
    assert done.returncode == 2 and "numbers and ranges" in done.stderr


@pytest.mark.parametrize("name", ["toaster", "meta", "mps", "xpu", "cuda:7"])
def test_devices_that_are_not_there(name, capsys):
    there = patch("torch.cuda.is_available", return_value=True)
    two = patch("torch.cuda.device_count", return_value=2)
    with there, two, pytest.raises(SystemExit) as stopped: main(["bench", "--device", name])
    assert stopped.value.code == 2 and f"'{name}' is " in capsys.readouterr().err


MISTAKES = [     # exit code, arguments, a word of the message
    (2, ["train", "--data", "DATA"], "--out"),
    (2, ["fly"], "fly"),
    (2, ["train", "--data", "DATA", "--out", "OUT/x", "--lr", "-1"], "lr"),
    (2, ["train", "--data", "DATA", "--out", "OUT/x", "--teacher", "p.csv"], "unrecognized"),
    (1, ["train", "--data", "DATA", "--out", "OUT/x", "--valid-batches", "99"], "99"),
    (1, ["train", "--data", "OUT", "--out", "OUT/x"], "train"),
    (2, ["predict", "--run", "small", "--data", "DATA", "--workers", "-1", "--out", "OUT/x.csv"], "-1"),
    (2, ["predict", "--run", "small", "--data", "DATA", "--out", "OUT/x.txt"], ".parquet"),
    (2, ["predict", "--run", "small", "--data", "DATA", "--out", "OUT/skipped.csv"], "another"),
    (2, ["predict", "--run", "small", "--data", "DATA", "--out", "OUT/file/x.csv"], "file"),
    (1, ["predict", "--run", "OUT/nothing", "--data", "DATA", "--out", "OUT/x.csv"], "nothing"),
    (2, ["evaluate", "--predictions", "none.csv", "--data", "DATA", "--out", "OUT/file"], "file"),
    (2, ["display", "--data", "DATA", "--event", "brightest", "--out", "OUT/x"], ".html"),
    (2, ["display", "--data", "DATA", "--event", "brightest", "--out", "OUT/folder.html"], "is a folder"),
    (1, ["display", "--data", "DATA", "--event", "-77", "--out", "OUT/e.html"], "-77"),
    (2, ["display", "--data", "DATA", "--event", str(2**63), "--out", "OUT/e.html"], "64 bits"),
    (1, ["display", "--data", "OUT/empty", "--event", "brightest", "--out", "OUT/e.html"], "no train files"),
    (2, ["bench", "--data", "DATA", "--out", "OUT/x.csv"], ".json"),
    *[(2, ["train", "--data", "DATA", "--out", "OUT/x", option, str(10**20)], "too large: at most")
      for option in ("--batch-size", "--max-pulses", "--graph-pulses", "--epochs", "--workers", "--seed")],
    *[(2, ["simulate", "--out", "OUT/x", "--events", "9", option, str(10**20)], "too large: at most")
      for option in ("--events", "--workers", "--seed")],
    (2, ["train", "--data", "DATA", "--out", "OUT/x", "--train-batches", "1-100000000"], "at most 100,000"),
    (1, ["predict", "--run", "OUT/pipe", "--data", "DATA", "--out", "OUT/x.csv"], "no weights at"),
    (1, ["predict", "--run", "small", "--data", "OUT/pipes", "--out", "OUT/x.csv"], "not a regular file"),
    (1, ["convert", "OUT/pipe", "--out", "OUT/x"], "no such file"),
    (1, ["predict", "--run", "OUT/red\x1b[31m", "--data", "DATA", "--out", "OUT/x.csv"], r"red\x1b[31m"),
    (2, ["simulate", "--out", "OUT/x", "--events", "9", "--red\x1b[31m"], r"arguments: --red\x1b[31m"),
    (2, ["train", "--data", "DATA", "--out", "OUT/x", "--minutes", "1e20"], "at most 525,600, a year"),
    (1, ["train", "--data", "DATA", "--out", "OUT/deep", "--resume"], "deep"),
    *[(2, [verb, *more, "--out", "OUT/file/x"], "file is a file: choose a folder")
      for verb, more in {"simulate": ["--events", "9"], "prepare": ["--data", "DATA"],
                         "train": ["--data", "DATA"], "convert": ["OUT/table.csv"],
                         "evaluate": ["--data", "DATA", "--run", "small"]}.items()],
    (2, ["bench", "--quick", "--out", "OUT/file/x.json"], "file is a file: choose a folder"),
]


@pytest.mark.parametrize("code, arguments, word", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tiny_dataset, tmp_path, code, arguments, word):
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/settings.json").write_text("[" * 100_000)
    (tmp_path / "table.csv").write_text("event_id,sensor_id,time,charge,auxiliary\n1,0,10,1,False\n")
    (tmp_path / "empty/train").mkdir(parents=True)
    (tmp_path / "pipes/train").mkdir(parents=True)
    for name in ("pipe", "pipes/train_meta.parquet", "pipes/train/batch_1.parquet"):
        os.mkfifo(tmp_path / name)     # whoever opens it to read waits for a writer
    done = call(*(a.replace("DATA", str(tiny_dataset)).replace("OUT", str(tmp_path)) for a in arguments))
    assert done.returncode == code and word in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("error, message", [
    (BrokenProcessPool("a process died"), "error: a process died\n"),
    (RuntimeError("almost no event\nmore"), "error: almost no event\n"),
    (RuntimeError(), "error: RuntimeError\n"),
    (torch.OutOfMemoryError("full"), "error: full; in training, a smaller --graph-pulses"),
    (MemoryError("7 TiB"), "error: out of memory (7 TiB): load fewer events"),
    (OverflowError("int too big"), "error: int too big"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "/dev/shm; load without processes"),
    (OSError(errno.ENOSPC, "No space"), "error: standard output cannot be written"),
])
def test_errors_from_elsewhere_are_one_line(error, message, capsys):
    with patch("iceaggr.simulation.dataset.simulate_dataset", side_effect=error):
        assert main(["simulate", "--events", "1", "--out", "x"]) == 1
    assert message in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(tiny_dataset, tmp_path, capsys):
    assert main(["predict", "--data", str(tiny_dataset), "--run", "small", "--device", "cpu",
                 "--out", str(tmp_path / "\x1b[31mred.csv")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"\x1b[31mred.csv" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["train", "--help"]])
def test_help_that_cannot_be_written(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "iceaggr.cli", *arguments], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "standard output cannot be written" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_is_full_or_closed(tiny_dataset, tmp_path):
    "One line of error, or none where the reader of a pipe has gone; the predictions are there."
    out = tmp_path / "p.csv"
    command = [sys.executable, "-m", "iceaggr.cli", "predict", "--data", str(tiny_dataset), "--run", "small",
               "--out", str(out)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 1 and len(lines) == 1 and "standard output cannot be written" in lines[0]
    assert len(pd.read_csv(out)) == 21
    out.unlink()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 128 + signal.SIGPIPE and "rror" not in done.stderr, done.stderr
    assert len(pd.read_csv(out)) == 21


def test_predictions_survive_a_full_disk(tiny_dataset, tmp_path, monkeypatch, capsys):
    "They are written to the temporary folder, and the message names both files."
    to_csv, calls = pd.DataFrame.to_csv, []
    def full_at_first(table, path, **options):
        calls.append(path)
        Path(path).write_text("half")
        if len(calls) == 1: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return to_csv(table, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", full_at_first)
    command = ["predict", "--data", str(tiny_dataset), "--run", "small", "--out", str(tmp_path / "p.csv")]
    assert main([*command, "--device", "cpu"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / 'p.csv'} cannot be written (No space left" in message
    kept = Path(message.rpartition(" ")[2])
    assert len(pd.read_csv(kept)) == 21 and not list(tmp_path.glob("*p.csv*"))


@pytest.mark.parametrize("before, expected", [
    ("", "5000"), ("import torch", "None"), ("import os; os.environ['GOMP_SPINCOUNT'] = '7'", "7"),
    ("import os; os.environ['OMP_WAIT_POLICY'] = 'passive'", "None")])
def test_threads_wait_without_spinning_for_long(before, expected):
    "Unless torch is loaded already, or the user has decided."
    code = f"{before}\nimport iceaggr, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("error", [NotImplementedError, RecursionError, KeyError])
def test_mistakes_of_the_program_keep_their_traceback(error):
    failing = patch("iceaggr.simulation.dataset.simulate_dataset", side_effect=error("here"))
    with failing, pytest.raises(error):
        main(["simulate", "--events", "1", "--out", "x"])


def test_core_modules_need_only_the_core_packages():
    script = """
import sys
for name in ("plotly", "matplotlib", "ipywidgets", "scipy", "sklearn", "fastcore", "nbdev", "IPython"):
    sys.modules[name] = None
import iceaggr.training, iceaggr.model, iceaggr.evaluation, iceaggr.display, iceaggr.simulation.dataset
import iceaggr.studies.comparison, iceaggr.studies.baselines, iceaggr.benchmark, iceaggr.cli
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- simulate, train, predict, evaluate


LOG_ROW = dict(epoch=1, minutes=1.0, train_loss=1.0, valid_loss=1.0, held_out_mean_degrees=50.0,
               valid_mean_degrees=50.0, valid_median_degrees=40.0, events_per_s=100.0)


@pytest.mark.parametrize("change", [
    {},
    dict(epoch=99_999, minutes=999_999.9, held_out_mean_degrees=180.0, valid_mean_degrees=180.0,
         valid_median_degrees=180.0, events_per_s=9_999_999.0),
    dict(train_loss=-1.234567e-30, valid_loss=-9.87654e30),
    {name: float("nan") for name in LOG_ROW if name != "epoch"},
])
def test_the_line_of_an_epoch_fits_into_80_columns(change):
    head = _EPOCH_HEAD.splitlines()[-1]
    names = re.findall(r"held out|\S+", head)
    line = _describe_epoch(LOG_ROW | change)
    assert len(line.split()) == len(names) and len(line) == len(head) < 80


def test_the_end_of_a_training_says_which_events_chose_the_epoch(capsys):
    "Also where another epoch has the lower error on the validation events."
    log = pd.DataFrame([LOG_ROW | dict(epoch=epoch, step=99 * epoch, held_out_mean_degrees=held_out,
                                       valid_mean_degrees=valid)
                        for epoch, held_out, valid in ((1, 40, 41), (2, 30, 31.5), (3, 31, 30.25))])
    poor = log[:2].assign(held_out_mean_degrees=[89.0, 88.0])
    args = argparse.Namespace(out="runs/a", on_bad_event="error")
    for rows, other in ((log, True), (log[:2], False), (poor, False)):
        _report_training(args, rows)
        shown = capsys.readouterr().out
        assert "best epoch: 2, chosen by the held-out training events\n" in shown and "31.50" in shown
        assert ("epoch 3 has a lower mean error on the validation events (30.25)" in shown) == other
        assert max(map(len, shown.splitlines())) < 80


def test_simulation_options(tmp_path):
    options = ["--double-cascades", 0.3, "--bundles", 0.4, "--directions", "atmospheric", "--saturation"]
    done = call("simulate", "--events", 40, "--out", tmp_path / "data", *options, "--dead-doms", 0)
    assert done.returncode == 0, done.stderr
    assert {"double_cascade", "muon_bundle"} < set(pd.read_parquet(tmp_path / "data/truth.parquet").type)
    assert json.loads((tmp_path / "data/simulation.json").read_text())["dead_doms"] == 0
    assert call("simulate", "--events", 40, "--out", tmp_path / "none", "--bundles", 2).returncode == 2
    assert not (tmp_path / "none").exists()


def test_train_predict_evaluate_from_either_form(tiny_dataset, tmp_path):
    "Both forms of the data give the same batches, so the same weights and predictions."
    assert call("prepare", "--data", tiny_dataset, "--out", tmp_path / "prepared", "--check").returncode == 0
    tables = []
    for form in (tiny_dataset, tmp_path / "prepared"):
        run = tmp_path / f"run-{form.name}"
        done = call("train", "--data", form, "--out", run, *SHORT_RUN)
        assert done.returncode == 0 and "\r" not in done.stderr, done.stderr
        poor = pd.read_csv(run / "log.csv").held_out_mean_degrees.min() > 80
        assert ("little better than guessing" in done.stdout) == poor
        settings = json.loads((run / "settings.json").read_text())
        assert settings["train_batches"] == [2, 3] and settings["valid_batches"] == [10]
        assert settings["train"]["batch_size"] == 4
        predictions = run / "p.parquet"
        done = call("predict", "--run", run, "--data", form, "--batches", 10, "--out", predictions)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_parquet(predictions))
        assert tables[-1].event_id.tolist() == [10_000 + 3 * i for i in range(7)]
    pd.testing.assert_frame_equal(*tables)
    report = tmp_path / "report"
    done = call("evaluate", "--predictions", predictions, "--data", tiny_dataset, "--out", report)
    assert done.returncode == 0, done.stderr
    assert json.loads((report / "metrics.json").read_text())["n_events"] == 7


def test_a_submission_has_three_columns(tiny_dataset, tmp_path):
    out, run = tmp_path / "s.csv", tmp_path / "run"
    assert call("train", "--data", tiny_dataset, "--out", run, *SHORT_RUN).returncode == 0
    done = call("predict", "--run", run, "--data", tiny_dataset, "--submission", "--out", out)
    assert done.returncode == 0, done.stderr
    assert list(pd.read_csv(out)) == ["event_id", "azimuth", "zenith"]


def test_training_starts_from_other_weights(tiny_dataset, tmp_path):
    args = ["train", "--data", tiny_dataset, *SHORT_RUN]
    assert call(*args, "--out", tmp_path / "first").returncode == 0
    first = read_weights(tmp_path / "first")[1]
    second = [*args, "--out", tmp_path / "second", "--init", tmp_path / "first", "--lr", 1e-12]
    done = call(*second)
    assert done.returncode == 0, done.stderr
    for name, x in read_weights(tmp_path / "second")[1].items():     # with this rate they hardly move
        if name == "t2.calibration": continue
        torch.testing.assert_close(x, first[name], atol=1e-6, rtol=1e-4, msg=name)
    shutil.rmtree(tmp_path / "first")     # a resume has its own state
    assert call(*second, "--resume").returncode == 0
    done = call(*args, "--out", tmp_path / "third", "--init", tmp_path / "nothing")
    assert done.returncode == 1 and "no weights at" in done.stderr


def test_too_few_events_to_hold_any_out(tiny_dataset, tmp_path):
    options = ["--epochs", 1, "--train-batches", "2", "--valid-batches", 10]
    done = call("train", "--data", tiny_dataset, "--out", tmp_path / "run", *options)
    assert done.returncode == 1 and "too few" in done.stderr, done.stderr


def test_interrupted_training_resumes_to_the_same_weights(tiny_dataset, tmp_path):
    options = ["--epochs", 8, "--batch-size", 2, "--train-batches", "2,3", "--valid-batches", 10]
    args = ["train", "--data", tiny_dataset, *options]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*args, "--out", whole).returncode == 0
    process, = launch(tmp_path / "said", run_command, [*map(str, args), "--out", str(cut)])
    until = time.monotonic() + 120
    while not (cut / "state.pt").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert ended([process]) == [130] and "--resume" in (tmp_path / "said").read_text()
    assert len(pd.read_csv(cut / "log.csv")) < 8
    refused = call(*args, "--out", cut)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = call(*args, "--out", cut, "--resume")
    assert done.returncode == 0, done.stderr
    expected, resumed = last_weights(whole), last_weights(cut)
    assert all((expected[name] == resumed[name]).all() for name in expected)
    assert len(pd.read_csv(cut / "log.csv")) == 8
    assert not [path for path in cut.iterdir() if "part" in path.name]


def test_another_detector_is_refused(tiny_dataset, tmp_path):
    run, sensors = tmp_path / "run", tiny_dataset / "sensor_geometry.csv"
    assert call("train", "--data", tiny_dataset, "--out", run, "--epochs", 1).returncode == 0
    Geometry(Geometry.icecube86().xyz + [1.5, 0, 0]).to_csv(sensors)
    done = call("predict", "--run", run, "--data", tiny_dataset, "--out", tmp_path / "p.csv")
    assert done.returncode == 1 and "1.5 m" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "p.csv").exists()


def test_bad_data_are_named_without_traceback(tiny_dataset, tmp_path):
    "Also from a process that loads."
    path = tiny_dataset / "train/batch_3.parquet"
    table = pd.read_parquet(path)
    table.iloc[4, table.columns.get_loc("charge")] = float("nan")
    table.to_parquet(path)
    for workers in (0, 1):
        out = tmp_path / f"run{workers}"
        done = call("train", "--data", tiny_dataset, "--out", out, "--epochs", 1, "--workers", workers)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert all(word in done.stderr for word in ("batch_3.parquet", "charge", "3000"))


# --- display


def test_display_takes_what_predict_wrote(tiny_dataset, tmp_path):
    "Gaps of other events, none for this one, and a kappa of zero."
    ids = pd.read_parquet(tiny_dataset / "train_meta.parquet").event_id
    predictions = pd.DataFrame({"event_id": ids, "azimuth": 1.0, "zenith": 1.0, "kappa": 0.0})
    predictions.loc[predictions.index[-1], ["azimuth", "zenith", "kappa"]] = float("nan")
    predictions.to_parquet(tmp_path / "p.parquet")
    for event, drawn in ((ids.iloc[0], True), (ids.iloc[-1], False)):
        options = ["--predictions", tmp_path / "p.parquet", "--out", tmp_path / "event.html"]
        done = call("display", "--data", tiny_dataset, "--event", event, *options)
        assert done.returncode == 0, done.stderr
        assert (f"p.parquet has no prediction of event {event}" in done.stdout) != drawn
        page = (tmp_path / "event.html").read_text()
        assert ("path predicted" in page) == drawn == bool(re.search(r" pulses, [\d.]+(°|\\u00b0) off", page))


def test_displays_of_a_model(tiny_dataset, tmp_path):
    display = ["display", "--data", tiny_dataset, "--event", "brightest"]
    done = call(*display, "--animate", "--out", tmp_path / "moving.html")
    assert done.returncode == 0 and "light until" in (tmp_path / "moving.html").read_text(), done.stderr
    done = call(*display, "--out", tmp_path / "event.pdf")
    assert done.returncode == 0 and (tmp_path / "event.pdf").read_bytes().startswith(b"%PDF"), done.stderr


def test_looks_of_a_display(tiny_dataset, tmp_path):
    "Options of the display, and what is known of the event in the title."
    meta = pd.read_parquet(tiny_dataset / "train_meta.parquet")
    data, event = shutil.copytree(tiny_dataset, tmp_path / "data"), meta.event_id.iloc[0]
    truth = pd.DataFrame(dict(event_id=meta.event_id, type="cascade", energy=13_310_000.))
    truth.to_parquet(data / "truth.parquet")
    look = ["--theme", "dark", "--colors", "icecube", "--from-first-light", "--plotly", "beside"]
    display = ["display", "--data", data, "--event", event, *look, "--out"]
    done = call(*display, tmp_path / "pages/e.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "pages/e.html").read_text()
    assert f"event {event}, cascade, 13.3 PeV, " in page and "from first light" in page and "#e01e26" in page
    (data / "events.csv").write_text(f"event_id,name,date\n{event},Ernie,2012-01-03\n")
    done = call(*display, tmp_path / "pages/ernie.html")
    assert done.returncode == 0, done.stderr
    assert "Ernie, cascade, 13.3 PeV, 2012-01-03, " in (tmp_path / "pages/ernie.html").read_text()
    assert sorted(p.name for p in (tmp_path / "pages").iterdir()) == ["e.html", "ernie.html", "plotly.min.js"]


@pytest.mark.parametrize("out, more, word", [
    ("OUT/e.jpg", (), ".png"),
    ("OUT/e.png", ("--animate",), "--animate"),
    ("DATA/train_meta.parquet/e.png", (), "is a file"),
])
def test_what_display_can_write(tiny_dataset, tmp_path, out, more, word):
    out = out.replace("OUT", str(tmp_path)).replace("DATA", str(tiny_dataset))
    done = call("display", "--data", tiny_dataset, "--event", "brightest", "--out", out, *more)
    assert done.returncode == 2 and word in done.stderr and not list(tmp_path.glob("e.*")), done.stderr


def test_home(tiny_dataset, tmp_path):
    "The shell leaves the ~ of --out=~/x alone."
    command = [sys.executable, "-m", "iceaggr.cli", "display", f"--data={tiny_dataset}", "--event=brightest"]
    options = dict(env={**os.environ, "HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run([*command, "--out=~/event.png"], **options)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["event.png"] and not (tmp_path / "~").exists()


@pytest.mark.parametrize("column, values, words", [
    ("event_id", lambda meta: "x", "column event_id should hold whole numbers"),
    ("batch_id", lambda meta: meta.batch_id.astype("Int64").mask(meta.index == 7), "column batch_id, event"),
])
def test_display_checks_the_meta_table(tiny_dataset, tmp_path, column, values, words):
    path = tiny_dataset / "train_meta.parquet"
    meta = pd.read_parquet(path)
    meta.assign(**{column: values(meta)}).to_parquet(path, index=False)
    event = meta.event_id[7]
    done = call("display", "--data", tiny_dataset, "--event", event, "--out", tmp_path / "e.html")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_one_event_needs_one_file(tiny_dataset, tmp_path, monkeypatch):
    "In both forms of a data set; an event that is not there is reported as missing."
    prepared, read = prepare(tiny_dataset, tmp_path / "prepared", progress=False), []
    read_events = iceaggr.data.read_prepared_events

    def watched(path, batch_id, *args):
        read.append(batch_id)
        return read_events(path, batch_id, *args)

    monkeypatch.setattr("iceaggr.data.read_prepared_events", watched)
    for data in (tiny_dataset, prepared):
        dataset, row = find_event(data, "train", 3006)
        assert len(dataset) == 1 and (dataset.event_ids[0], row.event_id, row.batch_id) == (3006, 3006, 3)
    assert read == [3]
    for data in (tiny_dataset, prepared):
        with pytest.raises(DataError, match="3007"): find_event(data, "train", 3007)
        with pytest.raises(DataError, match="event 3006"): find_event(data, "train", 3006, [2])
        assert find_event(data, "train", "brightest", [3])[1].batch_id == 3


def spoil(path, events, table):
    "Give the first pulse of some events no charge."
    spoilt = table.reset_index()
    spoilt.loc[[event.first_pulse_index for event in events], "charge"] = 0.0
    spoilt.set_index("event_id").to_parquet(path)


def test_bad_events_and_displays(tiny_dataset, tmp_path):
    "A bad event does not stop the display of another one; a bad event itself is named, whatever the form."
    path, meta = tiny_dataset / "train/batch_10.parquet", pd.read_parquet(tiny_dataset / "train_meta.parquet")
    meta = meta[meta.batch_id == 10]
    meta = meta.iloc[np.argsort(meta.last_pulse_index - meta.first_pulse_index, kind="stable")]
    least, second, most = meta.iloc[[0, -2, -1]].itertuples()
    table = pd.read_parquet(path)
    spoil(path, [least], table)
    assert find_event(tiny_dataset, "train", "brightest")[1].event_id == most.event_id
    spoil(path, [least, most], table)
    dataset, _ = find_event(tiny_dataset, "train", "brightest")
    with pytest.raises(DataError, match=f"event {most.event_id}: 0.0 is not"): dataset[0]
    with pytest.warns(UserWarning, match="left out"):
        assert find_event(tiny_dataset, "train", "brightest", None, "skip")[1].event_id == second.event_id
    with pytest.warns(UserWarning, match="left out"):
        prepared = prepare(tiny_dataset, tmp_path / "prepared", [10], progress=False, on_bad_event="skip")
    reason = f"event {least.event_id} was left out, as .*: column charge: 0.0 is not"
    for data in (tiny_dataset, prepared):
        with pytest.warns(UserWarning), pytest.raises(DataError, match=reason):
            find_event(data, "train", int(least.event_id), [10], "skip")
    spoil(path, meta.itertuples(), table)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="file 10 has no good event"):
        find_event(tiny_dataset, "train", "brightest", None, "skip")


# --- nothing is written over


@pytest.fixture
def forms(tiny_dataset, tmp_path):
    "A data set, its prepared form, and a folder of links to it."
    prepared, link = tmp_path / "prepared", tmp_path / "link"
    prepare(tiny_dataset, prepared, progress=False)
    link.mkdir()
    for name in ("train", "train_meta.parquet"): (link / name).symlink_to(tiny_dataset / name)
    return tiny_dataset, prepared, link


def test_predictions_spare_the_data(forms):
    data, prepared, link = forms
    before = files_of(data), files_of(prepared)
    places = [(data, "train_meta.parquet"), (data, "train/batch_2.parquet"), (data, "train/new.csv"),
              (link, "train/batch_2.parquet"), (link, "train_meta.parquet"), (prepared, "truth.parquet")]
    for root, name in places:
        done = call("predict", "--data", root, "--run", "small", "--out", root / name)
        assert done.returncode == 2 and f"{root / name}: this is a file of the data set" in done.stderr
    for verb in (["predict", "--run", "small", "--out", prepared / "p.csv"],
                 ["evaluate", "--predictions", "p.csv", "--out", prepared]):     # the list of its bad events
        done = call(*verb, "--data", prepared, "--on-bad-event", "skip")
        assert done.returncode == 2 and "skipped.csv: this is a file" in done.stderr, done.stderr
    done = call("prepare", "--data", link, "--out", data)
    assert done.returncode == 1 and "holds a data set in the Kaggle layout" in done.stderr, done.stderr
    assert before == (files_of(data), files_of(prepared)) and (link / "train_meta.parquet").is_symlink()


def test_predictions_spare_a_run(tiny_dataset, tmp_path):
    (tmp_path / "settings.json").touch()
    for name, more in (("log.csv", ()), ("p.csv", ("--on-bad-event", "skip"))):
        done = call("predict", "--data", tiny_dataset, "--run", "small", "--out", tmp_path / name, *more)
        assert done.returncode == 2 and "this is a file of the run" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["settings.json"]


@pytest.fixture
def two_data_sets(tmp_path):
    "Two simulated data sets with the same event ids."
    options = dict(events_per_file=20, progress=False)
    return [simulate_dataset(tmp_path / f"data{seed}", 40, seed=seed, **options) for seed in (1, 2)]


def test_prepared_form_of_another_data_set_stays(two_data_sets, tmp_path):
    one, two = two_data_sets
    prepare(one, tmp_path / "out", progress=False)
    before = files_of(tmp_path / "out")
    done = call("prepare", "--data", two, "--out", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "batch_1.events.arrow: was prepared from another data set: event 0 differs in" in done.stderr
    assert before == files_of(tmp_path / "out")


def test_prepared_form_keeps_its_truth_and_sensors(two_data_sets, tmp_path):
    one, two = two_data_sets
    part, options = prepare(one, tmp_path / "part", [1], progress=False), dict(split="test", progress=False)
    words = "truth.parquet: differs .*, but train/batch_1.events.arrow was prepared"
    with pytest.raises(DataError, match=words):
        prepare(two, part, [2], progress=False)
    (two / "test").mkdir()
    shutil.copy(two / "train/batch_1.parquet", two / "test")
    meta = pd.read_parquet(two / "train_meta.parquet").query("batch_id == 1")
    meta.drop(columns=["azimuth", "zenith"]).to_parquet(two / "test_meta.parquet", index=False)
    with pytest.raises(DataError, match="truth.parquet: differs"): prepare(two, part, **options)
    (two / "truth.parquet").unlink()
    sensors, geometry = (two / "sensor_geometry.csv").read_bytes(), load_geometry(two)
    Geometry(geometry.xyz + [100.0, 0, 0]).to_csv(two / "sensor_geometry.csv")
    with pytest.raises(DataError, match="sensor_geometry.csv: differs"): prepare(two, part, **options)
    (part / "sensor_geometry.csv").unlink()     # stands for the nominal sensors
    with pytest.raises(DataError, match="sensor_geometry.csv: differs"): prepare(two, part, **options)
    (two / "sensor_geometry.csv").write_bytes(sensors)
    assert len(IceCubeDataset(prepare(two, part, **options), "test")) == 20


def test_prepared_form_of_a_mended_data_set_is_made_anew(two_data_sets, tmp_path):
    data, _ = two_data_sets
    out, path = prepare(data, tmp_path / "out", progress=False), data / "train_meta.parquet"
    meta = pd.read_parquet(path)
    pd.concat([meta, meta[:1]]).to_parquet(path, index=False)
    with pytest.raises(DataError, match="lies inside the range of another event"):
        prepare(data, out, progress=False)
    meta[meta.event_id != 3].to_parquet(path, index=False)
    assert len(IceCubeDataset(prepare(data, out, progress=False))) == 39


def test_rows_left_empty_are_counted(tiny_dataset, tmp_path, monkeypatch, capsys):
    "Weights that are finite and overflow; the file is whole."
    model = HierarchicalTransformer.from_pretrained("small")
    with torch.no_grad(): model.t2.head[-1].weight.mul_(1e38)
    model.save(tmp_path / "large.safetensors")
    for extra in ([], ["--submission"]):
        assert main(["predict", "--data", str(tiny_dataset), "--run", str(tmp_path / "large.safetensors"),
                     "--out", str(tmp_path / "p.csv"), "--device", "cpu", *extra]) == 0
        empty = int(pd.read_csv(tmp_path / "p.csv").azimuth.isna().sum())
        assert empty and f"{empty} rows without values" in capsys.readouterr().out
