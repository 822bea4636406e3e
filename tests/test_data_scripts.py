"""The scripts that make data sets of others: thinner light, moved cascades, files joined."""
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import call

from iceaggr.data import IceCubeDataset
from iceaggr.geometry import Geometry, load_geometry
from iceaggr.simulation.dataset import simulate_dataset

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
VERTEX = ["vertex_x", "vertex_y", "vertex_z"]


def batch_tables(folder): return [pd.read_parquet(path) for path in sorted((folder / "train").iterdir())]


# thin_events.py

@pytest.fixture(scope="module")
def mixed_events(tmp_path_factory):
    "300 events of all kinds in two files."
    folder = tmp_path_factory.mktemp("thin") / "data"
    return simulate_dataset(folder, 300, seed=5, events_per_file=150, progress=False, mix="ppc")


def thin(data, out, *options):
    return call(data, out, "--files", "1,2", *options, script=SCRIPTS / "thin_events.py")


def light_of(folder):
    "Charge, pulses, auxiliary pulses and sensors of each event."
    pulses = pd.concat(batch_tables(folder))
    return pulses.groupby("event_id").agg(
        charge=("charge", "sum"), pulses=("charge", "size"), noise=("auxiliary", "sum"),
        sensors=("sensor_id", frozenset))


def truth_of(folder):
    truth, meta = (pd.read_parquet(folder / name) for name in ("truth.parquet", "train_meta.parquet"))
    return truth.merge(meta, on=["batch_id", "event_id"]).set_index("event_id")


def test_with_all_light_an_event_stays_as_it_is(mixed_events, tmp_path):
    "Every tenth event is held out, and left out here."
    assert thin(mixed_events, tmp_path / "all", "--copies", 1, "--least", 1, "--most", 1).returncode == 0
    before, source = light_of(mixed_events), truth_of(mixed_events)
    same, truth = light_of(tmp_path / "all"), truth_of(tmp_path / "all")
    of = before.loc[truth.source_event].set_index(same.index)
    assert len(same) == 270
    assert not (source.index.get_indexer(truth.source_event) % 10 == 9).any()
    assert all(b <= a for a, b in zip(of.sensors, same.sensors, strict=True))
    assert abs(same.pulses.sum() / of.pulses.sum() - 1) < 0.05
    assert abs(same.charge.sum() / of.charge.sum() - 1) < 0.03


def test_with_half_the_light_the_noise_stays(mixed_events, tmp_path):
    "The charge falls in proportion; direction, kind and vertex are kept."
    done = thin(mixed_events, tmp_path / "half", "--copies", 2, "--least", 0.5, "--most", 0.5)
    assert done.returncode == 0, done.stderr
    half, truth = light_of(tmp_path / "half"), truth_of(tmp_path / "half")
    of = light_of(mixed_events).loc[truth.source_event].set_index(half.index)
    origin = truth_of(mixed_events).loc[truth.source_event]
    assert len(half) < 540 and set(truth.batch_id) == {1, 2} and (truth.light == 0.5).all()
    for column in ("azimuth", "zenith", "type", "vertex_x"):
        assert np.array_equal(truth[column], origin[column])
    bright, faint = of.charge > 300, of.charge < 80     # most auxiliary pulses of faint events are noise
    assert bright.sum() > 20
    assert ((half.charge / of.charge)[bright] - 0.5).abs().median() < 0.06
    assert 0.8 < half.noise[faint].mean() / of.noise[faint].mean() < 1.1
    assert "already" in thin(mixed_events, tmp_path / "half").stderr


def test_thinning_names_what_is_wrong(mixed_events, tmp_path):
    out = tmp_path / "none"
    for options in (("--copies", 0), ("--held-out", 1)):
        assert "at least" in thin(mixed_events, out, *options).stderr
    assert "shares" in thin(mixed_events, out, "--least", 0.9, "--most", 0.5).stderr
    missing = call(mixed_events, out, "--files", "7", script=SCRIPTS / "thin_events.py")
    assert "no events of a file 7" in missing.stderr
    path = mixed_events / "truth.parquet"
    whole = path.read_bytes()
    try:
        pd.read_parquet(path).drop(index=3).to_parquet(path, index=False)
        assert "truth.parquet: 1 of 150 events of file 1 are missing" in thin(mixed_events, out).stderr
    finally: path.write_bytes(whole)
    assert not out.exists()


# move_cascades.py

def move(data, out, *options): return call(data, out, *options, script=SCRIPTS / "move_cascades.py")


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    "Cascades of a detector off the grid, and their moved copies."
    folder = tmp_path_factory.mktemp("move")
    shifts = np.random.default_rng(0).uniform([-8, -8, -4], [8, 8, 4], (86, 3)).repeat(60, axis=0)
    geometry = Geometry(Geometry.nominal().xyz + shifts)
    data = simulate_dataset(folder / "data", 300, seed=6, events_per_file=150, progress=False, mix="cascades",
                            geometry=geometry)
    done = move(data, folder / "moved", "--files", "1,2", "--copies", 2, "--least", 1, "--most", 1)
    assert done.returncode == 0, done.stderr
    return data, folder / "moved"


def test_cascades_move_sideways_and_keep_their_direction(moved):
    "Tracks and held-out events are left out."
    data, out = moved
    source = pd.read_parquet(data / "truth.parquet").set_index("event_id")
    truth = pd.read_parquet(out / "truth.parquet")
    origin = source.loc[truth.source_event].reset_index()
    assert len(truth) > 80 and (origin.type == "cascade").all()
    assert not (truth.source_event % 10 == 9).any()
    meta, directions = (pd.read_parquet(folder / "train_meta.parquet").set_index("event_id")
                        for folder in (out, data))
    for column in ("azimuth", "zenith"):
        assert np.array_equal(meta[column], directions[column].loc[truth.source_event])
    vectors = truth[VERTEX].to_numpy() - origin[VERTEX].to_numpy()
    assert (vectors[:, 2] == 0).all() and (np.hypot(vectors[:, 0], vectors[:, 1]) > 120).all()
    assert len(np.unique(vectors.round(3), axis=0)) > 20


def light_per_dom(pulses, vertex, xyz):
    "Charge, number of pulses and earliest delay after unscattered light of each DOM."
    distance = np.linalg.norm(xyz[pulses.sensor_id] - vertex, axis=1)
    delay = pulses.time.to_numpy() - 1.36 / 0.299792458 * distance
    return pulses.assign(delay=delay).groupby("sensor_id").agg(
        charge=("charge", "sum"), delay=("delay", "min"), n=("delay", "size"))


def test_the_light_of_each_dom_is_found_again(moved):
    "On the DOM at its depth, as far away as the cascade was moved, with the same delay by scattering."
    data, out = moved
    xyz, truth = load_geometry(data).xyz, pd.read_parquet(out / "truth.parquet")
    source = pd.read_parquet(data / "truth.parquet").set_index("event_id")
    before, after = (pd.concat(batch_tables(folder)) for folder in (data, out))
    before, after = before[~before.auxiliary], after[~after.auxiliary]
    found = checked = 0
    for row in truth.itertuples():
        start = source.loc[row.source_event, VERTEX].to_numpy(float)
        end = np.array([row.vertex_x, row.vertex_y, row.vertex_z])
        a = light_per_dom(before.loc[[row.source_event]], start, xyz)
        b = light_per_dom(after.loc[[row.event_id]], end, xyz)
        a = a[a.index < 78 * 60].nlargest(4, "charge")
        offset = xyz[a.index, None] + (end - start) - xyz[None, b.index]
        near = (np.linalg.norm(offset[..., :2], axis=2) < 22) & (np.abs(offset[..., 2]) < 12)
        pairs = [(x, b.iloc[close.argmax()])
                 for (_, x), close in zip(a.iterrows(), near, strict=True) if close.sum() == 1]
        found += sum(abs(y.charge / x.charge - 1) < 0.05 for x, y in pairs)
        checked += len(pairs)
        shifts = np.array([y.delay - x.delay for x, y in pairs if x.n == y.n])
        if len(shifts) > 1:     # the trigger shifts all times of an event alike; times are whole nanoseconds
            assert np.median(np.abs(shifts - np.median(shifts))) < 3, shifts
    assert checked > 200 and found > 0.8 * checked, (found, checked)


def test_data_without_cascades_are_refused(tmp_path):
    data = simulate_dataset(tmp_path / "data", 20, seed=1, events_per_file=20, progress=False)
    truth = pd.read_parquet(data / "truth.parquet")
    truth.assign(type="track_through").to_parquet(data / "truth.parquet")
    refused = move(data, tmp_path / "none", "--files", "1")
    assert refused.returncode and "no cascade" in refused.stderr and not (tmp_path / "none").exists()


# join_datasets.py

def join(out, *files): return call(out, *files, script=SCRIPTS / "join_datasets.py")


@pytest.fixture
def two_sets(tmp_path):
    return [simulate_dataset(tmp_path / name, 60, seed=seed, events_per_file=30, progress=False)
            for name, seed in (("a", 1), ("b", 2))]


def test_joined_events_keep_pulses_and_truth(two_sets, tmp_path):
    "Event ids are new."
    a, b = two_sets
    done = join(tmp_path / "both", f"{a}:2:20", f"{b}:1", f"{b}:2")
    assert done.returncode == 0, done.stderr
    both = IceCubeDataset(tmp_path / "both")
    assert len(both) == 80 and both.event_ids.tolist() == list(range(80))
    parts = [list(IceCubeDataset(root, batch_ids=[f]))[:n]
             for root, f, n in ((a, 2, 20), (b, 1, 30), (b, 2, 30))]
    for event, source in zip(both, sum(parts, []), strict=True):
        for key in ("pulse_features", "target"): assert torch.equal(event[key], source[key])
    truth = pd.read_parquet(tmp_path / "both/truth.parquet")
    assert np.array_equal(truth.energy[20:], pd.read_parquet(b / "truth.parquet").energy)
    assert truth.batch_id.tolist() == [101] * 20 + [102] * 30 + [103] * 30


def test_joining_names_what_is_wrong(two_sets, tmp_path):
    "An existing folder, a missing file, another detector."
    a, b = two_sets
    assert "already" in join(a, f"{b}:1").stderr
    assert "no events of a file 7" in join(tmp_path / "none", f"{a}:7").stderr
    assert not (tmp_path / "none").exists()
    geometry = b / "sensor_geometry.csv"
    def moved(match): return f"{match[1]},{float(match[2]) + 5}"
    geometry.write_text(re.sub(r"(?m)^(\d+),(-?[\d.]+)", moved, geometry.read_text()))
    assert "another detector" in join(tmp_path / "other", f"{a}:1", f"{b}:1").stderr
    assert not (tmp_path / "other").exists()
