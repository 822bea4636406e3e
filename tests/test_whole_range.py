"""The scripts that train on the whole range of brightness, and judge by it."""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import call

from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, angular_error, vmf_quantile
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.studies.baselines import DOMSummaries, FirstPulsesOfAll, Summary
from iceaggr.studies.detector_faults import with_muons

STUDIES = Path(__file__).parents[1] / "studies"


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    "Sixty events of 1 to 5 TeV in three files."
    folder = tmp_path_factory.mktemp("whole") / "events"
    options = dict(seed=4, events_per_file=20, energy=(1e3, 5e3), mix="ppc", progress=False)
    return simulate_dataset(folder, 60, **options)


@pytest.fixture(scope="module")
def joined(events):
    "What whole_range_data.py makes, each set being the same events."
    out = events.with_name("joined")
    done = call(out, "--ppc", events, "--other-ice", events, "--bright", events, "--simulated", events,
                script=STUDIES / "whole_range_data.py")
    assert done.returncode == 0, done.stderr
    return out / "events"


def directions(folder, files):
    meta = pd.read_parquet(folder / "train_meta.parquet")
    return meta[meta.batch_id.isin(files)][["azimuth", "zenith"]].round(6)


def test_every_tenth_event_is_kept_from_the_training(events, joined):
    "Of each set, and of the dimmed copies too."
    all_files = pd.read_parquet(joined / "train_meta.parquet").batch_id.unique().tolist()
    assert sorted(all_files) == [1, 2, 3, 4, 101, 102, 103, 104]
    source = directions(events, [1, 2, 3])
    kept = directions(joined, [1])
    assert kept.to_numpy().tolist() == source.iloc[9::10].to_numpy().tolist()
    of = {k: set(map(tuple, directions(joined, files).to_numpy())) for k, files in
          dict(train=[101, 102, 103, 104], kept=[1, 4]).items()}
    assert not of["train"] & of["kept"] and len(of["train"] | of["kept"]) == 60


def test_only_confidence_and_calibration_are_fitted(joined, tmp_path):
    "The vectors keep their directions; kappa, calibrated in bins, comes nearer to the errors."
    out, before = tmp_path / "fitted.safetensors", HierarchicalTransformer.from_pretrained("small")
    done = call("small", out, "--events", f"{joined}:101", f"{joined}:102", "--held-out", f"{joined}:1,4",
                script=STUDIES / "fit_confidence.py")
    assert done.returncode == 0, done.stderr
    after = HierarchicalTransformer.load(out)
    fitted = after.state_dict()
    changed = [name for name, p in before.state_dict().items() if not torch.equal(p, fitted[name])]
    assert changed and all(name.startswith("t2.confidence.") or name == "t2.calibration" for name in changed)
    n = IceCubeDataset(joined, batch_ids=[101, 102]).n_pulses
    assert after.seen["pulses"] == [n.min(), n.max()]


def test_scripts_of_the_study(events, joined, tmp_path, monkeypatch):
    "Data, a training of some steps for two methods, and the rows of the table."
    monkeypatch.syspath_prepend(STUDIES)
    import what_t1_brings as study
    data = tmp_path / "data"
    options = ["--seeds", "0", "--minutes", "0.02", "--hardware", "test"]
    for argv in (["make", data, "--typical", events, "--whole", events, "--bright", events],
                 ["train", data, "summary", "first-8", *options]):
        monkeypatch.setattr(sys, "argv", ["what_t1_brings.py", *map(str, argv)])
        monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
        study.main()
    table = pd.read_csv(tmp_path / "results.csv")
    assert set(table.method) == {"summary", "first-8"} and set(table.data) == {"simulated", "ppc_bright"}
    bright = table[(table.data == "ppc_bright") & (table.method == "summary")]
    assert bright.events.sum() == 60 and np.isfinite(table[["median", "mean", "loss"]]).all(axis=None)


def test_figures_by_brightness(events, tmp_path, monkeypatch):
    "Errors and shares as worked out from the predictions; rows of the same model are replaced."
    out = tmp_path / "brightness.csv"
    for _ in range(2):
        done = call("a=small", "--data", f"{events}:2", "--out", out,
                    script=STUDIES / "judge_by_brightness.py")
        assert done.returncode == 0, done.stderr
    table = pd.read_csv(out)
    assert table.events.sum() == 20 and set(table.model) == {"a"}
    meta = pd.read_parquet(events / "train_meta.parquet").merge(
        pd.read_parquet(events / "truth.parquet"), on=["batch_id", "event_id"])
    meta = meta[meta.batch_id == 2]
    pulses = pd.read_parquet(events / "train/batch_2.parquet").reset_index()
    found = HierarchicalTransformer.from_pretrained("small").predict(pulses)
    vectors = [angles_to_vector(*torch.tensor(table[["azimuth", "zenith"]].to_numpy(float)).T)
               for table in (found, meta)]
    error, kappa = angular_error(*vectors), torch.tensor(found.kappa.to_numpy(float))
    inside = (error <= vmf_quantile(kappa, 0.68)).numpy()
    assert (table.inside * table.events).sum() == pytest.approx(inside.sum())
    assert (table["mean"] * table.events).sum() == pytest.approx(np.degrees(error.numpy()).sum(), rel=1e-4)


def test_coincident_muons_stay_within_the_read_out():
    "Every event keeps its pulses and its span; those added are of one muon, from a random time on."
    frame = pd.DataFrame({"event_id": [0, 0, 1, 1], "sensor_id": 7, "time": [6_000, 16_000, 8_000, 9_000],
                          "charge": 1.0, "auxiliary": True})
    muon = pd.DataFrame({"event_id": 5, "sensor_id": [1, 2, 3], "time": [0, 400, 5_000],
                         "charge": 2.0, "auxiliary": False})
    starts = []
    for seed in range(40):
        both = with_muons(frame, [muon], np.random.default_rng(seed))
        pd.testing.assert_frame_equal(both[both.auxiliary].reset_index(drop=True), frame)
        added = both[~both.auxiliary]
        assert added.groupby("event_id").time.max().le([16_000, 9_000]).all()
        assert set(added.sensor_id[added.event_id == 1]) <= {1, 2}  # the third comes after the read-out
        first = added.groupby("event_id").time.min()
        assert first.ge([6_000, 8_000]).all()
        starts.append(first[0])
    assert np.ptp(starts) > 7_000


def test_faults_by_brightness(tmp_path, monkeypatch):
    "Every event under each fault; without a fault nothing changes; saturation leaves dim events alone."
    monkeypatch.syspath_prepend(STUDIES)
    import faults_by_brightness as study
    out = tmp_path / "faults.csv"
    make = study.simulate_chunk
    monkeypatch.setattr(study, "simulate_chunk", lambda detector, seed, chunk, settings: make(
        detector, seed, chunk, replace(settings, energy=(200.0, 2e3))))
    monkeypatch.setattr(sys, "argv", ["", "--chunks", "1", "--models", "small", "--out", str(out)])
    study.main()
    table = pd.read_csv(out)
    assert set(table.fault) == {"none", "saturation", "coincident muon"}
    assert (table.groupby("fault").events.sum() == 100).all()
    change = table.set_index(["fault", "low"]).change
    assert (change["none"] == 0).all()
    assert abs(change["saturation", 0]) < 0.1 < change["coincident muon", 0]


def dom(times, charges):
    "An event whose pulses lie on one DOM, beside another DOM with one pulse."
    pulses = [[t, q, 100, 0] for t, q in zip(times, charges, strict=True)] + [[9_900, 1, 200, 0]]
    pulses = torch.tensor(sorted(pulses), dtype=torch.float32)
    return dict(pulse_features=pulses, event_id=torch.tensor(1), n_pulses=torch.tensor(len(pulses)))


@pytest.mark.parametrize("times, charges, expected", [
    ([10_000], [3.], [0, 0, 0]),
    ([10_000, 10_010, 10_100], [1., 8., 1.], [0, 10, 10]),
    ([10_000, 10_010, 10_100, 10_400], [0.05, 1., 1., 8.], [10, 400, 400]),
    (range(10_000, 11_200), [1.] * 1_200, [119, 599, 1_079])])         # cut into several sequences
def test_times_of_the_charge(times, charges, expected):
    "When 10, 50 and 90 % of the charge have come, whatever lies beside the DOM."
    summary, seen = Summary(8), []
    summary.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = collate_dom_packing([dom(times, charges)])
    summary(batch)
    row = batch["metadata"]["sensor_ids"].tolist().index(100)
    assert torch.expm1(3 * seen[0][row]).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", [DOMSummaries, FirstPulsesOfAll])
def test_other_descriptions_of_doms_go_through_a_file(kind, tmp_path):
    batch = collate_dom_packing([dom(range(10_000, 10_020), [1.] * 20)])
    model = kind().eval()
    model.save(tmp_path / "model.safetensors")
    with torch.no_grad(): assert torch.equal(kind.load(tmp_path / "model.safetensors")(batch), model(batch))
