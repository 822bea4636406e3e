"""The weights that come with the package."""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import call

import iceaggr
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, angular_error, vmf_quantile
from iceaggr.geometry import load_geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.training import TrainSettings, calibrate, predict_with_truth, train

SCRIPTS = Path(__file__).parents[1] / "studies"
sys.path.append(str(SCRIPTS))
from average_weights import average, best_share, find_held_out  # noqa: E402

WEIGHTS = Path(iceaggr.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    "Events with the detector of the weights."
    return IceCubeDataset(
        simulate_dataset(
            tmp_path_factory.mktemp("simulated") / "data",
            500,
            seed=77,
            events_per_file=300,
            geometry=load_geometry(WEIGHTS / "small.safetensors"),
            progress=False,
        )
    )


@pytest.mark.parametrize("name", ["small", "base"])
def test_on_simulated_events(simulated, name):
    "The mean error, and whether kappa is honest."
    error, kappa, _ = predict_with_truth(HierarchicalTransformer.from_pretrained(name), simulated)
    assert float(torch.rad2deg(error.mean())) < 22
    assert 0.6 < float((error <= vmf_quantile(kappa, 0.68)).double().mean()) < 0.78


def test_calibration_covers_the_sure_half_like_the_other(simulated):
    model = HierarchicalTransformer.from_pretrained("small")
    model.t2.calibration.copy_(torch.tensor([0.5, 1.4]))                # replaced, not built upon
    factor, power = calibrate(model, simulated, np.arange(len(simulated)))
    error, kappa, _ = predict_with_truth(model, simulated)
    inside, sure = (error <= vmf_quantile(kappa, 0.68)).double(), kappa > kappa.median()
    assert (
        power != 1
        and abs(float(inside.mean()) - 0.68) <= 0.004
        and abs(float(inside[sure].mean() - inside[~sure].mean())) < 0.02
    )
    assert calibrate(model, simulated, np.arange(100))[1] == 1 and calibrate(
        model, simulated, np.arange(49)
    ) == (1.0, 1.0)
    untouched = HierarchicalTransformer.from_pretrained("small")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_training_starts_from_them_and_goes_on(simulated, tmp_path):
    settings = TrainSettings(epochs=1, lr=1e-5, valid_events=100)
    some = dict(train_batches=[1], valid_batches=[2], settings=settings, progress=False)
    init = shutil.copy(WEIGHTS / "small.safetensors", tmp_path)
    log = train(simulated.root, tmp_path / "run", "small", init=init, **some)
    assert log.valid_mean_degrees.iloc[-1] < 25
    os.remove(init)                                                     # a run that goes on has what it needs
    again = train(simulated.root, tmp_path / "run", "small", init=init, resume=True, **some)
    assert len(again) == len(log) and again.valid_mean_degrees.iloc[-1] == log.valid_mean_degrees.iloc[-1]


def test_seed_of_a_run():
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"): TrainSettings(seed=-1)


def test_average_of_weights():
    a, b, c = (HierarchicalTransformer("small") for _ in range(3))
    found, start = average(a, [b, c], 0.2), [p.clone() for p in a.parameters()]
    for p, x, y, z in zip(found.parameters(), a.parameters(), b.parameters(), c.parameters(), strict=True):
        torch.testing.assert_close(p, 0.2 * x + 0.4 * y + 0.4 * z)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), start, strict=True))


def test_share_of_an_average_that_does_not_lean():
    def figure(mean, bias):
        return dict(mean_degrees=mean, bias_zenith_degrees=bias, se_bias_zenith_degrees=0.4)
    assert (
        best_share({0.0: figure(16.2, 0.1), 0.2: figure(16.0, -0.5), 0.5: figure(15.9, 0.7)}) == 0.2
    )  # the best one leans
    with pytest.raises(ValueError, match="leans"): best_share({0.5: figure(15.9, 0.7), 0.8: figure(16, -2)})


def test_events_that_choose_the_share(tiny_dataset):
    dataset, settings = (
        IceCubeDataset(tiny_dataset),
        TrainSettings(held_out=4, valid_events=3),
    )  # files 2, 3 and 10 of 8, 6 and 7 events
    assert (
        find_held_out(dataset, settings).tolist() == [11, 15, 19]
        and find_held_out(dataset, settings, [2, 3]).tolist() == [3, 7, 11]
        and find_held_out(dataset, settings, [10]).tolist() == [15, 19]
    )


@pytest.mark.slow
def test_runs_are_averaged_by_the_script(simulated, tmp_path):
    for seed in (1, 2):
        train(
            simulated.root,
            tmp_path / f"run{seed}",
            "small",
            train_batches=[1],
            valid_batches=[2],
            settings=TrainSettings(epochs=1, lr=1e-4, seed=seed, held_out=3),
            init="small",
            progress=False,
        )
    def average_runs(*args):
        return call(
            tmp_path / "out",
            "--start",
            WEIGHTS / "small.safetensors",
            "--data",
            simulated.root,
            "--runs",
            tmp_path / "run1",
            tmp_path / "run2",
            *args,
            script=SCRIPTS / "average_weights.py",
        )
    done = average_runs("--share", "0.5", "--judge-batches", "2")
    assert (
        done.returncode == 2
        and "not trained on files [2]" in done.stderr
        and not (tmp_path / "out").exists()
    ), done.stderr
    done = average_runs("--share", "0.25", "--judge-batches", "1")
    assert (
        done.returncode == 0
        and "on 100 held-out events" in done.stdout
        and "share 0.25 taken" in done.stdout
    ), done.stdout + done.stderr
    found, start, one, two = (
        dict(HierarchicalTransformer.load(x).named_parameters())
        for x in (
            tmp_path / "out",
            WEIGHTS / "small.safetensors",
            tmp_path / "run1/last.safetensors",
            tmp_path / "run2/last.safetensors",
        )
    )
    for name, x in found.items():
        torch.testing.assert_close(x, 0.25 * start[name] + 0.375 * (one[name] + two[name]))
    assert not torch.equal(one["t2.head.3.weight"], two["t2.head.3.weight"])
    done = average_runs("--share", "0.5")
    assert done.returncode == 2 and "out exists and is not empty" in done.stderr, done.stderr
    saved = torch.load(tmp_path / "run2/state.pt", weights_only=True)
    torch.save({**saved, "finished": False}, tmp_path / "run2/state.pt")
    done = average_runs("--share", "0.25")
    assert done.returncode == 2 and "run2 has not ended" in done.stderr, done.stderr


@pytest.mark.skipif("ICEAGGR_PPC" not in os.environ, reason="needs full-physics events: ICEAGGR_PPC")
@pytest.mark.parametrize("name", ["small", "base"])
def test_on_full_physics_events(name):
    dataset = IceCubeDataset(os.environ["ICEAGGR_PPC"], batch_ids=[4])
    some = np.sort(np.random.default_rng(0).choice(len(dataset), 1_000, replace=False))
    error, _, _ = predict_with_truth(HierarchicalTransformer.from_pretrained(name), dataset, some)
    assert float(torch.rad2deg(error.mean())) < 18


def test_small_enough_and_described():
    assert sum(p.stat().st_size for p in WEIGHTS.glob("*.safetensors")) < 12e6
    for path in WEIGHTS.glob("*.safetensors"): assert path.stem in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["small", "base"])
def test_predictions_stay_what_they_were(name):
    "500 simulated events, one of 12,000 pulses on 40 DOMs: predictions are as they were."
    stored = Path(__file__).parent / "data"
    pulses = pd.read_parquet(stored / "reference_events.parquet")
    before = (
        pd.read_parquet(stored / "reference_predictions.parquet")
        .query("model == @name")
        .set_index("event_id")
    )
    now = HierarchicalTransformer.from_pretrained(name).predict(pulses).set_index("event_id")
    before, now = before.loc[now.index], now[["azimuth", "zenith", "kappa"]]
    assert len(now) == 500
    moved = angular_error(
        *(angles_to_vector(*torch.tensor(t[["azimuth", "zenith"]].to_numpy().T)) for t in (before, now))
    )
    assert float(torch.rad2deg(moved).max()) < 0.001
    assert float((now.kappa / before.kappa - 1).abs().max()) < 0.001
