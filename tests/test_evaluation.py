"""Evaluation: hand-made cases, calibration, and what can be wrong with a file of predictions."""
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vector_to_angles, vmf_sample
from iceaggr.evaluation import (
    _bin_numbers,
    _binned,
    _bootstrap,
    _likelihood_scale,
    _pulls,
    calibration,
    check_predictions,
    evaluate,
    event_errors,
    event_truth,
    plot_types,
    read_predictions,
    summary,
)

ANGLES = ["event_id", "azimuth", "zenith"]
GOOD = pd.DataFrame({"event_id": [5, 6, 7], "azimuth": [0.0, 1, 6], "zenith": [0.1, 1, 3]})


@pytest.fixture
def truth():
    "Four events from simple directions: up, down, east, north."
    return pd.DataFrame({
        "event_id": [11, 7, 30, 2],
        "azimuth": [0, 0, 0, math.pi / 2],
        "zenith": [0, math.pi, math.pi / 2, math.pi / 2],
        "n_pulses": [20, 40, 40, 5000],
        "type": ["cascade", "track", "track", "track"],
        "energy": [100.0, 1e3, np.nan, 1e5],
    })


def shifted(frame, degrees):
    "Predictions that are wrong by given angles along the meridian."
    towards_the_top = np.where(frame.zenith > 0, 1, -1)
    return frame[["event_id", "azimuth"]].assign(zenith=frame.zenith - np.radians(degrees) * towards_the_top)



# Errors and metrics


def test_known_errors_whatever_the_order(truth):
    "Errors, overall metrics and bins of four events."
    expected = pd.Series([1.0, 2, 30, 90], index=truth.event_id)
    predictions = shifted(truth, expected.to_numpy()).iloc[[2, 0, 3, 1]]
    events = event_errors(predictions, truth)
    assert np.allclose(events.set_index("event_id").error.loc[expected.index], expected)
    metrics = evaluate(predictions, truth)
    model = metrics["model"]
    assert metrics["n_events"] == 4 and "line_fit" not in metrics
    assert math.isclose(model["mean_degrees"], 123 / 4) and math.isclose(model["median_degrees"], 16)
    assert math.isclose(model["mean_rad"], math.radians(123 / 4))
    types = {row["name"]: row for row in metrics["by"]["type"]}
    assert types["cascade"]["n"] == 1 and types["track"]["n"] == 3
    assert math.isclose(types["track"]["model"]["median"], 30)
    assert sum(row["n"] for row in metrics["by"]["energy"]) == 3                    # one energy is unknown
    assert [(row["low"], row["n"]) for row in metrics["by"]["n_pulses"]] == [(0, 1), (32, 2), (4096, 1)]


def test_no_error_and_opposite_directions(truth):
    "The truth has error 0, in any order; opposite directions have 180 degrees."
    perfect = event_errors(truth[ANGLES].sample(frac=1, random_state=0), truth)
    assert perfect.error.max() < 1e-5 and perfect.event_id.equals(truth.event_id)
    opposite = truth.assign(azimuth=truth.azimuth + math.pi, zenith=math.pi - truth.zenith)
    assert np.allclose(event_errors(opposite, truth).error, 180)


def test_azimuth_wraps():
    "0.01 and 2 pi - 0.01 are 0.02 apart."
    azimuth = np.array([0.01, 2 * math.pi - 0.01])
    truth = pd.DataFrame({"event_id": [1, 2], "azimuth": azimuth, "zenith": math.pi / 2})
    model = evaluate(truth.assign(azimuth=azimuth[::-1]), truth)["model"]
    assert math.isclose(model["mean_rad"], 0.02, rel_tol=1e-9) and abs(model["bias_azimuth_degrees"]) < 1e-9


def test_baseline_gain(truth):
    "Gain and share of better events with respect to a baseline."
    metrics = evaluate(shifted(truth, [1, 1, 1, 9]), truth, shifted(truth, [2, 2, 2, 2]))
    gain = metrics["gain"]
    assert math.isclose(gain["mean_degrees"], -1) and math.isclose(gain["share_better"], 0.75)
    assert math.isclose(metrics["line_fit"]["mean_degrees"], 2)
    assert metrics["by"]["type"][0]["line_fit"]["median"] == pytest.approx(2)


def test_summary_of_known_errors():
    "Mean, median, 68 % and bias of 1 to 100 degrees."
    events = pd.DataFrame({"error": np.arange(1.0, 101), "offset_azimuth": 1.0, "offset_zenith": -1.0})
    found = summary(events)
    assert found["mean_degrees"] == 50.5 and found["median_degrees"] == 50.5
    assert abs(found["p68_degrees"] - 68.32) < 1e-9 and found["bias_zenith_degrees"] == -1
    assert abs(found["se_mean_degrees"] / (events.error.std() / 10) - 1) < 0.15


def test_bins_hold_every_event():
    "Low edges belong to the bin; each known value is in one bin."
    x = pd.Series([0.0, 31, 32, 4096, 1e9, np.nan])
    assert _bin_numbers(x, (0, 32, 4096, math.inf)).tolist()[:5] == [0, 0, 1, 2, 2]
    assert math.isnan(_bin_numbers(x, (0, 32, 4096, math.inf)).iloc[5])
    rng = np.random.default_rng(0)
    rows = _binned(pd.DataFrame({"n_doms": rng.integers(5, 1000, 300), "error": rng.random(300)}), "n_doms")
    assert sum(row["n"] for row in rows) == 300
    assert all(row["low"] <= row["centre"] < row["high"] for row in rows)


def test_bootstrap_matches_the_formula():
    "Standard error of the mean; seeded; scaled from a part for many events."
    x = np.random.default_rng(0).exponential(1, 4000)
    assert abs(_bootstrap(np.mean, x, resamples=400) / (x.std() / math.sqrt(4000)) - 1) < 0.15
    assert _bootstrap(np.mean, x, resamples=50) == _bootstrap(np.mean, x, resamples=50)
    many = np.random.default_rng(0).normal(size=500_000)
    assert abs(_bootstrap(np.mean, many, resamples=50) * math.sqrt(500_000) - 1) < 0.35


# Calibration


def calibrated_predictions(kappa, n=4000):
    "Truth, and predictions blurred with von Mises-Fisher noise of that kappa."
    rng = np.random.default_rng(3)
    columns = {"azimuth": rng.uniform(0, 2 * math.pi, n), "zenith": np.arccos(rng.uniform(-1, 1, n))}
    truth = pd.DataFrame({"event_id": np.arange(n)} | columns)
    directions = angles_to_vector(truth.azimuth.to_numpy(), truth.zenith.to_numpy())
    blurred = vmf_sample(directions, torch.full((n,), kappa), generator=torch.Generator().manual_seed(2))[0]
    azimuth, zenith = vector_to_angles(blurred)
    return truth, truth.assign(azimuth=azimuth, zenith=zenith, kappa=kappa)


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 50.0, 1e5])
def test_calibrated_kappa_is_called_calibrated(kappa):
    "Coverage, pulls and factor of predictions with known uncertainty."
    truth, predictions = calibrated_predictions(kappa)
    found = evaluate(predictions, truth)["calibration"]
    assert all(abs(found["coverage"][str(p)] - p / 100) < 0.03 for p in (50, 68, 90))
    assert abs(found["pull_median"] - found["pull_expected_median"]) < 0.06
    assert abs(found["pull_beyond_3"] - found["pull_expected_beyond_3"]) < 0.01
    if kappa >= 1: assert 0.85 < found["likelihood_scale"] < 1.15


def test_overconfidence_is_found():
    "Four times the kappa: low coverage, a quarter as factor."
    truth, predictions = calibrated_predictions(50.0)
    events = event_errors(predictions, truth)
    overconfident = calibration(events.assign(kappa=200.0))
    assert overconfident["coverage"]["68"] < 0.4
    factor = _likelihood_scale(events.error.to_numpy(), events.kappa.to_numpy())
    assert abs(4 * overconfident["likelihood_scale"] / factor - 1) < 1e-3
    assert abs(np.mean(_pulls(events.error.to_numpy(), events.kappa.to_numpy()) ** 2 / 2) - 1) < 0.07


def test_pulls_in_the_limits():
    "Large kappa: the error times sqrt(kappa). Finite everywhere."
    assert np.allclose(_pulls(np.degrees([1e-3, 2e-3]), np.array([1e6, 1e6])), [1, 2], rtol=1e-5)
    assert np.isfinite(_pulls(np.array([0., 180, 180]), np.array([0., 0, 1e5]))).all()


def test_calibration_without_kappa():
    "Only the coverage of r68, or nothing."
    events = pd.DataFrame({"error": [1.0, 3.0]})
    assert calibration(events) == {}
    assert calibration(events.assign(r68=2.0)) == {"coverage": {"68": 0.5}}


# Files of predictions

BAD = {
    "column": (GOOD.drop(columns="zenith"), "no column zenith"),
    "duplicate": (GOOD.assign(event_id=[5, 6, 5]), "duplicated: 1 rows, first events 5"),
    "nan": (GOOD.assign(azimuth=[0, np.nan, 1]), r"1 values of azimuth .* row 1 \(event 6\)"),
    "infinite": (GOOD.assign(zenith=[0, np.inf, 1]), "values of zenith"),
    "text": (GOOD.assign(zenith=["a", "1", "2"]), "values of zenith"),
    "degrees": (GOOD.assign(zenith=[10.0, 90, 170]), "radians"),
    "azimuth in degrees": (GOOD.assign(azimuth=[10.0, 90, 170]), "radians"),
    "fraction": (GOOD.assign(event_id=[5, 6.5, 7]), "whole number"),
    "fraction as text": (GOOD.assign(event_id=["5", "6.5", "7"]), "whole number"),
    "kappa": (GOOD.assign(kappa=[1, -1, 1]), "kappa is negative"),
    "kappa nan": (GOOD.assign(kappa=[1, np.nan, 1]), "values of kappa"),
    "r68": (GOOD.assign(r68=[1, 200, 1]), "r68 is outside"),
    "empty": (GOOD[:0], "no rows"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_bad_files_are_refused_by_name(fault, ending, tmp_path):
    "The message names the file and what is wrong."
    frame, message = BAD[fault]
    path = tmp_path / f"p{ending}"
    if ending == ".csv": frame.to_csv(path, index=False)
    else: frame.to_parquet(path, index=False)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{message}"): read_predictions(path)


FILES = [("p.csv", b""), ("p.parquet", b"not parquet"), ("q.parquet", b""), ("p.txt", b"event_id")]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_files_that_are_no_tables(name, content, tmp_path):
    "Empty, damaged and other files; a file that is not there."
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name): read_predictions(tmp_path / name)
    with pytest.raises(DataError, match="no such file"): read_predictions(tmp_path / "none.csv")


def test_good_files_come_back(tmp_path):
    "CSV and Parquet, ids as a column or as the index, other columns dropped."
    GOOD.to_csv(tmp_path / "a.csv", index=False)
    GOOD.to_parquet(tmp_path / "a.parquet")
    GOOD.set_index("event_id").to_parquet(tmp_path / "b.parquet")
    GOOD.assign(comment="x").to_csv(tmp_path / "c.csv", index=False)
    for name in ("a.csv", "a.parquet", "b.parquet", "c.csv"):
        pd.testing.assert_frame_equal(read_predictions(tmp_path / name), GOOD)


@pytest.mark.parametrize(("given", "expected"), [
    ([2**53 + 1, 2**53 + 2, 2**53 + 3], [2**53 + 1, 2**53 + 2, 2**53 + 3]),
    ([str(2**53 + 1), "6", "7"], [2**53 + 1, 6, 7]),
    (["5.0", "6", "7"], [5, 6, 7]),
])
def test_ids_keep_all_digits(given, expected):
    "float64 would lose digits."
    assert check_predictions(GOOD.assign(event_id=given)).event_id.tolist() == expected


def test_events_of_truth_and_predictions(truth):
    "Unknown, missing and duplicated events; a part of the events is fine."
    others = pd.DataFrame({"event_id": [99, 100], "azimuth": 0.0, "zenith": 0.0})
    with pytest.raises(DataError, match="2 of 6 events are not in the data: 99, 100"):
        event_errors(pd.concat([truth[ANGLES], others]), truth)
    with pytest.raises(DataError, match="baseline: 1 of 4 events are missing: 7"):
        event_errors(truth[ANGLES], truth, truth[truth.event_id != 7])
    assert len(event_errors(truth[ANGLES][:2], truth)) == 2
    with pytest.raises(DataError, match="duplicated"): event_errors(GOOD, pd.concat([GOOD, GOOD]))


# truth.parquet


def damaged(good, path, fault):
    "Write a truth.parquet with a fault."
    if fault == "ids as text": good.assign(event_id=good.event_id.astype(str)).to_parquet(path)
    elif fault == "energies as text": good.assign(energy="x").to_parquet(path)
    elif fault == "no ids": good.drop(columns="event_id").to_parquet(path)
    elif fault == "an id is missing":
        ids = good.event_id.astype("Int64")
        good.assign(event_id=ids.mask(ids == 3000)).to_parquet(path)
    elif fault == "duplicated": pd.concat([good, good[:1]]).to_parquet(path)
    else:
        good.to_parquet(path, write_page_checksum=True)
        data = path.read_bytes()
        path.write_bytes(data[:-9] if fault == "cut short" else data[:400] + b"\xff" * 200 + data[600:])


@pytest.mark.parametrize(("fault", "message"), [
    ("ids as text", "column event_id should hold whole numbers"),
    ("energies as text", "column energy should hold numbers"),
    ("no ids", "column event_id is missing"),
    ("an id is missing", "column event_id: 1 values are missing"),
    ("duplicated", "1 events are duplicated"),
    ("changed bytes", "damaged"),
    ("cut short", "not a Parquet file, or cut short"),
])
def test_truth_that_cannot_be_used(tiny_dataset, fault, message):
    "A truth.parquet with a fault is refused; a good one is read."
    dataset, path = IceCubeDataset(tiny_dataset), tiny_dataset / "truth.parquet"
    good = dataset.event_table()[["batch_id", "event_id"]].assign(energy=np.arange(21.), type="track")
    good.to_parquet(path)
    assert event_truth(dataset, tiny_dataset).energy.tolist() == good.energy.tolist()
    damaged(good, path, fault)
    with pytest.raises(DataError, match=f"truth.parquet: {message}"): event_truth(dataset, tiny_dataset)


def test_directions_of_flight_are_doubted():
    "The opposite direction is the usual mistake; good and random predictions pass."
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(dict(event_id=range(50), azimuth=rng.uniform(0, 2 * np.pi, 50),
                              zenith=np.arccos(rng.uniform(-1, 1, 50))))
    flight = truth.assign(azimuth=(truth.azimuth + np.pi) % (2 * np.pi), zenith=np.pi - truth.zenith)
    with pytest.warns(UserWarning, match="of flight .*error 180"): event_errors(flight, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        event_errors(truth, truth)
        event_errors(truth.assign(azimuth=rng.permutation(truth.azimuth)), truth)


def test_ids_of_predictions_are_exact():
    "A float beyond 2^53 may stand for several events."
    table = pd.DataFrame(dict(event_id=[2.0 ** 53 + 2, 3.0], azimuth=[1.0, 2.0], zenith=[1.0, 2.0]))
    with pytest.raises(DataError, match="event_id: .* read the ids as int64"): check_predictions(table)
    assert check_predictions(table.assign(event_id=[2.0, 3.0])).event_id.tolist() == [2, 3]
    large = [2 ** 62 + 1, -2 ** 63]
    assert check_predictions(table.assign(event_id=large)).event_id.tolist() == large


def test_dollars_in_a_type_are_text():
    "The name of a type may hold what matplotlib would read as a formula."
    quantiles = dict(median=1., mean=2.)
    row = dict(name="a $\\frac{", n=3, model=quantiles, line_fit=quantiles)
    plot_types(dict(by=dict(type=[row]))).canvas.draw()
