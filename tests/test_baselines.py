"""Baselines, ablations, and the scripts that fill their tables."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from iceaggr.augmentation import grid_motions, moved_sensors
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, angular_error
from iceaggr.dom_transformer import pulses_by_dom
from iceaggr.engine.loading import packed_batch
from iceaggr.geometry import Geometry
from iceaggr.model import HierarchicalTransformer, model_settings, predict_dataset
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.simulation.light import track_time
from iceaggr.studies.ablations import ABLATIONS, WithoutMoments, _rotate_back, predict_rotated
from iceaggr.studies.baselines import (
    FlatTransformer,
    PlainFlatTransformer,
    _earliest_doms,
    _place_in_dom,
    fit_track,
    smeared_gamma,
    track_likelihood,
)
from iceaggr.studies.detector_faults import FAULTS
from iceaggr.training import MuonAdamW, TrainSettings, fit, train_step, validate

SCRIPTS = Path(__file__).parents[1] / "studies"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Folder of 500 simulated events in two files."
    folder = tmp_path_factory.mktemp("simulated") / "events"
    return simulate_dataset(folder, 500, seed=1, events_per_file=400, progress=False)


@pytest.fixture(scope="module")
def bright_batch(root):
    "The four events with the most pulses."
    ds = IceCubeDataset(root, batch_ids=[1])
    batch = packed_batch(ds, np.argsort(-ds.n_pulses)[:4])
    assert (batch["metadata"]["event_dom_counts"] > 128).any()
    return batch


def new_model(kind, **sizes):
    "A small model with the same random numbers each time."
    torch.manual_seed(0)
    return kind({**vars(model_settings("small")), **sizes}, Geometry.icecube86()).eval()


def vectors_of(table):
    "Unit vectors of a table of directions."
    return angles_to_vector(*torch.tensor(table[["azimuth", "zenith"]].to_numpy(np.float64)).T)


# The flat transformer

def test_place_of_pulses_in_their_dom():
    dom, place = _place_in_dom(torch.tensor([2, 1, 3]))
    assert dom.tolist() == [0, 0, 1, 2, 2, 2] and place.tolist() == [0, 1, 0, 0, 1, 2]


def test_earliest_doms_with_events_in_any_order():
    time, event = torch.tensor([5.0, 1, 4, 2, 3, 1]), torch.tensor([1, 0, 1, 0, 0, 1])
    assert _earliest_doms(time, event, 2).tolist() == [1, 2, 3, 5]
    assert _earliest_doms(time, event, 3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [FlatTransformer, PlainFlatTransformer])
def test_flat_transformer_has_as_many_parameters(kind):
    sizes = [sum(p.numel() for p in new_model(k).parameters()) for k in (kind, HierarchicalTransformer)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.15


@pytest.mark.parametrize("place, counts", [(7, True), (8, False)])
def test_pulses_after_the_eighth_are_dropped(bright_batch, place, counts):
    flat = new_model(FlatTransformer)
    _, n = pulses_by_dom(bright_batch)
    longest = int(n.argmax())
    assert n[longest] > 8
    pulse = int(n[:longest].sum()) + place
    cell = bright_batch["metadata"]["pulse_positions"][pulse]
    sequences = bright_batch["packed_sequences"].clone()
    sequences.view(-1, 4)[cell, 1] = 50.0
    with torch.no_grad():
        before, after = (flat.t1(batch)[0] for batch in (
            bright_batch, dict(bright_batch, packed_sequences=sequences)))
    assert torch.equal(before, after) != counts


@pytest.mark.parametrize("first", [True, False])
def test_doms_after_the_128th_are_dropped(bright_batch, first):
    flat = new_model(FlatTransformer)
    with torch.no_grad():
        t2_batch = flat.t2_batch(bright_batch)
        event = t2_batch["dom_to_event_idx"] == int(bright_batch["metadata"]["event_dom_counts"].argmax())
        time = t2_batch["dom_features"][:, 0]
        dom = time.masked_fill(~event, 1e9).argmin() if first else time.masked_fill(~event, -1).argmax()
        embeddings = t2_batch["dom_embeddings"].clone()
        embeddings[dom] += 1
        before, after = (flat.t2.vector(**batch) for batch in (
            t2_batch, dict(t2_batch, dom_embeddings=embeddings)))
    assert torch.allclose(before, after, atol=1e-6) != first


def test_plain_inputs(bright_batch):
    "Plain models take no features of DOMs but their order, and no reference time of the event."
    later = dict(event_times=bright_batch["metadata"]["event_times"] + 100)
    with torch.no_grad():
        for kind, plain in ((PlainFlatTransformer, True), (FlatTransformer, False)):
            model = new_model(kind)
            t2_batch = model.t2_batch(bright_batch)
            scaled = dict(dom_features=t2_batch["dom_features"] * torch.tensor([1, 2.0, 3.0]))
            before = model.t2.vector(**t2_batch)
            for change in (later, scaled):
                after = model.t2.vector(**{**t2_batch, **change})
                assert torch.allclose(after, before, atol=1e-6) == plain


def test_flat_transformer_trains_and_loads(root, tmp_path):
    train, valid = IceCubeDataset(root, batch_ids=[1]), IceCubeDataset(root, batch_ids=[2])
    flat = new_model(FlatTransformer)
    before = validate(flat, valid)
    log = fit(flat, train, valid, tmp_path, TrainSettings(epochs=2), progress=False)
    assert log.valid_mean_degrees.iloc[-1] < before["mean_degrees"]
    best = log.valid_mean_degrees[log.held_out_mean_degrees.idxmin()]
    assert abs(validate(FlatTransformer.load(tmp_path), valid)["mean_degrees"] - best) < 1e-3


# The likelihood fit

SHAPES = [0.3, 1.0, 3.0, 8.0]


@pytest.mark.parametrize("sigma, tolerance", [(15.0, 0.04), (200.0, 0.15)])
@pytest.mark.parametrize("shape", SHAPES)
def test_smeared_gamma_is_a_convolution(shape, sigma, tolerance):
    rate, t = 0.004, np.array([-40.0, 0, 10, 60, 119, 121, 300, 1500])
    if sigma == 200.0: t = 5 * t
    quantiles = np.linspace(0, 1, 200_002)[1:-1]
    delays = stats.gamma.ppf(quantiles, shape, scale=1 / rate)
    expected = np.array([stats.norm.pdf(x - delays, scale=sigma).mean() for x in t])
    found = smeared_gamma(t, np.full(len(t), shape), rate, sigma)
    assert np.allclose(found, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_smeared_gamma_is_normalised(shape):
    t = np.arange(-100, 20_000, 0.5)
    assert abs(smeared_gamma(t, np.full(len(t), shape), 0.004).sum() * 0.5 - 1) < 0.01


@pytest.fixture(scope="module")
def ideal_track():
    "Point, direction and pulses of a track whose light is late by 10 ns on average."
    rng, xyz = np.random.default_rng(3), Geometry.icecube86().xyz
    u, point = np.array([0.48, -0.6, 0.64]), np.array([30.0, -40, 20])
    s = (xyz - point) @ u
    d = np.sqrt(((xyz - point) ** 2).sum(1) - s ** 2)
    near = np.flatnonzero((d < 60) & (np.abs(s) < 400))
    time = 10_000 + track_time(s[near], d[near]) + rng.exponential(10, len(near))
    pulses = np.stack([time, np.ones(len(near)), near, np.zeros(len(near))], 1)
    return point, u, pulses, xyz


def test_fit_finds_an_ideal_track(ideal_track):
    _, u, pulses, xyz = ideal_track
    found, _ = fit_track(pulses, xyz, starts=2)
    assert np.degrees(float(angular_error(torch.from_numpy(-found), torch.from_numpy(u)))) < 2


def test_true_track_is_the_most_likely(ideal_track):
    point, u, pulses, xyz = ideal_track
    side = np.cross(u, [0, 0, 1])
    side /= np.linalg.norm(side)
    values = []
    for angle in np.radians([-10, -3, 0, 3, 10]):
        rotated = np.cos(angle) * u + np.sin(angle) * side
        values.append(track_likelihood(point, rotated, xyz[pulses[:, 2].astype(int)], pulses[:, 0] - 10_000))
    assert np.argmin(values) == 2
    assert min(values[1], values[3]) > values[2] + 3


# Ablations

@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_the_model(bright_batch, name):
    whole = new_model(HierarchicalTransformer)
    model = new_model(ABLATIONS[name].kind, **ABLATIONS[name].model)
    with torch.no_grad(): expected, found = whole.vector(bright_batch), model.vector(bright_batch)
    if name == "without-muon": assert torch.equal(found, expected)      # only its training differs
    else: assert not torch.allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_through_a_file(bright_batch, tmp_path, name):
    model = new_model(ABLATIONS[name].kind, **ABLATIONS[name].model)
    model.save(tmp_path / "weights.safetensors")
    loaded = ABLATIONS[name].kind.load(tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert torch.allclose(loaded.vector(bright_batch), model.vector(bright_batch), atol=1e-6)


def test_silent_layer_stays_silent(bright_batch):
    model = new_model(WithoutMoments)
    encoder = model.t2.encoder
    before = encoder.light.weight.clone()
    train_step(model, MuonAdamW(model, 1e-3), bright_batch, TrainSettings(), 1e-3)
    assert (encoder.moments.weight == 0).all()
    assert (encoder.light.weight != before).any()


def test_optimizer_of_an_ablation():
    model, settings = new_model(HierarchicalTransformer), TrainSettings(lr=1e-3)
    assert ABLATIONS["without-layers"].optimizer(model, settings) is None
    optimizer = ABLATIONS["without-muon"].optimizer(model, settings)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


# Test-time augmentation

@pytest.fixture(scope="module")
def rotations():
    "Six rotations and their fixed point."
    motions, point = grid_motions(Geometry.icecube86())
    return [motion for motion in motions if np.linalg.det(motion) > 0], point


@pytest.fixture(scope="module")
def ds(root):
    "Forty events."
    return IceCubeDataset(root, batch_ids=[2], max_events=40)


def test_mean_of_the_six_predictions(ds, rotations):
    model = new_model(HierarchicalTransformer)
    sensors = model.t2.sensors
    single = predict_dataset(model, ds, progress=False)
    found = predict_rotated(model, ds, progress=False)
    motions, point = rotations
    assert len(motions) == 6
    model.check_geometry = lambda geometry: None      # it is about to be rotated
    vectors = []
    for motion in motions:
        model.t2.sensors = moved_sensors(sensors, motion, point)
        table = predict_dataset(model, ds, progress=False)
        kappa = torch.tensor(table.kappa.to_numpy())[:, None]
        vectors.append(_rotate_back(kappa * vectors_of(table), motion))
    mean = torch.stack(vectors).mean(0)
    assert torch.allclose(vectors_of(found), torch.nn.functional.normalize(mean, dim=1), atol=1e-3)
    assert np.allclose(found.kappa, mean.norm(dim=1), rtol=1e-3)
    assert not np.allclose(found.kappa, single.kappa, rtol=1e-3)


def test_rotated_detector_rotates_the_mean(ds, rotations):
    model = new_model(HierarchicalTransformer)
    sensors, expected = model.t2.sensors, vectors_of(predict_rotated(model, ds, progress=False))
    assert torch.equal(model.t2.sensors, sensors)      # put back
    motions, point = rotations
    model.check_geometry = lambda geometry: None
    model.t2.sensors = moved_sensors(sensors, motions[1], point)
    found = vectors_of(predict_rotated(model, ds, progress=False))
    assert torch.allclose(_rotate_back(found, motions[1]), expected, atol=1e-3)


# Detector faults

@pytest.fixture
def pulses():
    "150 pulses, a third of them auxiliary, in order of time."
    rng = np.random.default_rng(0)
    columns = np.sort(rng.uniform(9_000, 15_000, 150)), rng.uniform(0.2, 3, 150), rng.integers(0, 5160, 150)
    return np.stack([*columns, np.arange(150) % 3 == 0], 1).astype(np.float32)


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_pulses_are_sorted_and_repeatable(pulses, name):
    before = pulses.copy()
    found = FAULTS[name].apply(pulses, seed=1)
    assert found.dtype == np.float32 and (np.diff(found[:, 0]) >= 0).all()
    assert np.array_equal(found, FAULTS[name].apply(pulses, seed=1))
    assert np.array_equal(pulses, before)
    assert np.array_equal(found, pulses) == (name == "none")


def test_dead_modules_are_the_same_in_all_events(pulses):
    fault = FAULTS["20 % of the modules dead"]
    alive = set(fault.apply(pulses, 0)[:, 2])
    assert alive == set(fault.apply(pulses, 1)[:, 2])
    dead = pulses[~np.isin(pulses[:, 2], list(alive))]
    assert len(dead) and np.array_equal(fault.apply(dead, 0), dead)      # an event keeps its last pulses


def test_noise_comes_with_auxiliary_pulses(pulses):
    fault = FAULTS["noise tripled"]
    assert len(fault.apply(pulses, 0)) == 150 + 2 * 50
    coincident = pulses[pulses[:, 3] == 0]
    assert np.array_equal(fault.apply(coincident, 0), coincident)


# The scripts

def run_script(monkeypatch, name, *argv):
    "Run a script of the studies in this process."
    path = str(SCRIPTS / name)
    monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("method, rows", [
    ("hierarchy", ["hierarchy", "hierarchy, test-time augmentation"]),
    ("flat-plain", ["flat-plain"]),
    ("without-muon", ["without-muon"]),
    ("likelihood", ["likelihood"]),
])
def test_rows_are_appended(tiny_dataset, tmp_path, monkeypatch, capsys, method, rows):
    out = tmp_path / "results.csv"
    out.write_text("method,mean\nearlier,1.5\n")
    run_script(monkeypatch, "compare_baselines.py", method, "--data", tiny_dataset, "--train-batches", "2,3",
               "--test-batch", 10, "--minutes", 0.005, "--events", 2, "--hardware", "a test", "--out", out)
    table = pd.read_csv(out)
    assert table.method.tolist() == ["earlier", *rows]
    assert table["mean"].iloc[0] == 1.5
    new = table.iloc[1:]
    assert (new.hardware == "a test").all() and (new.seed == 0).all()
    assert new["mean"].between(0, 180).all() and new.line_fit_mean.between(0, 180).all()
    if method == "likelihood": assert (new.events == 2).all() and (new.steps == 0).all()
    else: assert (new.events == 7).all() and (new.steps >= 1).all() and new.steps.nunique() == 1


@pytest.fixture
def cascade_limits(tmp_path, monkeypatch):
    "A function that runs cascade_limit.py on four cascades: seeds of the limits computed, and the table."
    out, computed = tmp_path / "limits.csv", []

    def limit(detector, cascade, seed, dark=True):
        if dark:
            computed.append(seed)
            if len(computed) == 2: add_row_of_another_process()
        return dict(limit=1.0, expected=2.0, halves=0.0, rank=0.5)

    def add_row_of_another_process():
        table = pd.read_csv(out, dtype=str)
        pd.concat([table, table.assign(seed="9")]).to_csv(out, index=False)

    def run(*options):
        computed.clear()
        run_script(monkeypatch, "cascade_limit.py", 4, "--hardware", "a test", "--most", 100_000,
                   "--out", out, *options)
        return list(computed), pd.read_csv(out)

    monkeypatch.setattr("iceaggr.studies.limit.cascade_limit", limit)
    return run


def test_cascade_limits_of_several_runs(cascade_limits):
    "Rows that another process adds stay; finished events are computed again for another geometry only."
    computed, table = cascade_limits()
    assert computed == [0, 1, 2, 3]
    assert table.event.tolist() == [0, 0, 1, 2, 3] and table.seed.tolist() == [0, 9, 0, 0, 0]
    computed, table = cascade_limits()
    assert computed == [] and len(table) == 5
    computed, table = cascade_limits("--geometry", "small")
    assert computed == [0, 1, 2, 3] and table.simulation.astype(str).nunique() == 2
