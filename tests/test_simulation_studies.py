"""What the studies of the simulation compute: comparison with other events, limits of cascades."""
import numpy as np
import pandas as pd
import pytest

from iceaggr.common import DataError
from iceaggr.geometry import SPEED_OF_LIGHT, load_geometry
from iceaggr.simulation.dataset import make_detector, simulate_dataset
from iceaggr.simulation.light import (
    GROUP_INDEX,
    METRES_PER_GEV,
    cascade_expectation,
    cascade_light,
    draw_photons,
    shower_maximum,
)
from iceaggr.studies import comparison
from iceaggr.studies.limit import CascadePosterior, cascade_limit, delay_density, observed_cascades

VERTEX = np.array([30., -40., 120.])
DIRECTION = np.array([0.6, 0.48, 0.64])


@pytest.fixture(scope="module")
def detector():
    return make_detector()


# Comparison

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return simulate_dataset(tmp_path_factory.mktemp("data") / "set", 300, seed=12, progress=False)


def test_pulses_belong_to_their_truth(data):
    "Numbers of pulses per event are those of the meta table."
    pulses, truth = comparison.read_with_truth(data)
    assert (np.diff(pulses.event) >= 0).all()
    assert pulses.event.nunique() == len(truth) == 300
    count = truth.last_pulse_index - truth.first_pulse_index + 1
    assert np.array_equal(pulses.groupby("event").size(), count)


def test_event_without_truth_is_an_error(tmp_path):
    "It must not shift all events after it."
    data = simulate_dataset(tmp_path / "data", 20, seed=1, progress=False)
    truth = pd.read_parquet(data / "truth.parquet")
    truth.drop(index=3).to_parquet(data / "truth.parquet")
    with pytest.raises(DataError, match="truth.parquet: 1 of 20 events"): comparison.read_with_truth(data)


def test_places_relative_to_lines():
    "Distances along a line and off it, by hand."
    xyz = np.array([[10.0, 6, 8], [0, 0, 5]])
    s, d = comparison._along_and_off(xyz, np.zeros((1, 3)), np.array([[0.0, 0.6, 0.8]]))
    assert np.allclose(s, [10, 4])
    assert np.allclose(d, [10, 3])


@pytest.fixture
def cascade_and_light():
    "Truth with one cascade (event 1), and a pulse of 1 p.e. on every DOM, at the time of unscattered light."
    geometry = load_geometry()
    truth = pd.DataFrame({
        "type": ["track_through", "cascade"], "energy": 5e3, "e_deposited": 4e3,
        "vertex_x": 10., "vertex_y": 20., "vertex_z": -30., "azimuth": 1.0, "zenith": 2.0})
    r = np.linalg.norm(geometry.xyz - [10, 20, -30], axis=1)
    pulses = pd.DataFrame({
        "event": 1, "sensor_id": np.arange(len(geometry)), "time": 10_000 + GROUP_INDEX / SPEED_OF_LIGHT * r,
        "charge": 1., "auxiliary": False})
    return pulses, truth, geometry


def test_light_on_all_sides(cascade_and_light):
    "Equal light has no asymmetry; more and later light above, and more ahead, is found by as much."
    pulses, truth, geometry = cascade_and_light
    edges = (50, 150, 300)
    equal = comparison.light_by_side(pulses, truth, geometry, edges)
    assert np.allclose(equal.charge, 1)
    assert np.allclose(equal.delay, 0, atol=1e-9)
    above = geometry.xyz[:, 2] > -30
    late = pulses.assign(charge=1. + 2 * above, time=pulses.time + 70 * above)
    found = comparison.light_by_side(late, truth, geometry, edges).loc["above / below"]
    assert np.allclose(found.charge, 3)
    assert np.allclose(found.delay, 70)
    ahead = (geometry.xyz - [10, 20, -30]) @ comparison._flight(1.0, 2.0) > 0
    found = comparison.light_by_side(pulses.assign(charge=1. + ahead), truth, geometry, edges)
    assert np.allclose(found.loc["ahead / behind"].charge, 2)


def test_auxiliary_pulses_do_not_count_as_light(cascade_and_light):
    "With only auxiliary pulses below, the ratio is infinite."
    pulses, truth, geometry = cascade_and_light
    below = geometry.xyz[:, 2] <= -30
    with np.errstate(all="ignore"):
        found = comparison.light_by_side(pulses.assign(auxiliary=below), truth, geometry, (50, 300))
    assert np.isinf(found.loc["above / below"].charge).all()


def test_summaries_of_an_event(data):
    "As computed for one event with pandas."
    pulses, _ = comparison.read_with_truth(data)
    event = pulses[pulses.event == 3]
    row = comparison.event_summaries(pulses, load_geometry()).iloc[3]
    assert row["pulses"] == len(event)
    assert row["DOMs"] == event.sensor_id.nunique()
    assert row["strings"] == (event.sensor_id // 60).nunique()
    assert np.isclose(row["summed charge"], event.charge.sum())
    assert np.isclose(row["charge of the brightest DOM"], event.groupby("sensor_id").charge.sum().max())
    assert np.isclose(row["time spread, HLC"], event.time[~event.auxiliary].std(ddof=0))


# Limits of cascades

@pytest.mark.parametrize("distance, shape, scale", [(8., 0.05, 180.), (60., 0.4, 200.), (140., 1.5, 220.)])
def test_density_of_delays(distance, shape, scale):
    "It is a density, and that of the delays which the simulation draws."
    rng, n, step = np.random.default_rng(1), 200_000, 0.05
    pair = np.arange(n)
    law = [np.full(n, x) for x in (1., shape, scale, distance)]
    _, _, delay, _ = draw_photons(rng, pair, pair, np.zeros(n), *law)
    edges = np.r_[-10:40:2, 40:200:10, 200:1_000:50]
    drawn = np.histogram(delay, edges)[0] / len(delay)
    fine = np.arange(-60, 4_000, step) + step / 2
    density = delay_density(fine, *(np.full(len(fine), x) for x in (shape, scale, distance)))
    assert abs(density.sum() * step - 1) < 2e-3
    expected = np.histogram(fine, edges, weights=density * step)[0]
    assert np.abs(np.cumsum(drawn) - np.cumsum(expected)).max() < 0.02


def cascades(n, energy=2_000.):
    "Arguments of `cascade_light` for n equal cascades."
    return np.tile(VERTEX, (n, 1)), np.tile(DIRECTION, (n, 1)), np.zeros(n), np.full(n, energy)


@pytest.fixture(scope="module")
def expectation(detector):
    "Expected photo-electrons of a cascade of 2 TeV on each DOM."
    metres = METRES_PER_GEV * 2_000.
    centre = VERTEX + shower_maximum(2_000.) * DIRECTION
    mu, _, _, r = cascade_expectation(
        detector.ice, centre, DIRECTION, metres, detector.xyz, detector.efficiency)
    return np.where(r < detector.reach(np.array([metres]), 1), mu, 0)


def test_expected_counts_are_those_drawn(detector, expectation):
    "Means over 300 cascades."
    _, sensor, _, _ = cascade_light(np.random.default_rng(2), detector, *cascades(300))
    drawn = np.bincount(sensor, minlength=len(expectation)) / 300
    assert abs(drawn.sum() / expectation.sum() - 1) < 0.01
    assert (np.abs(drawn - expectation) < 6 * np.sqrt(expectation / 300) + 0.02).all()


def test_truth_is_most_probable(detector):
    "More probable than other directions, places, times and energies, nearly always."
    rng, log_energy, better = np.random.default_rng(2), np.log(2_000.), 0
    true = np.r_[VERTEX, 0., log_energy, DIRECTION]
    others = [np.r_[VERTEX, 0, log_energy, -DIRECTION], np.r_[VERTEX + [0, 0, 40], 0, log_energy, DIRECTION],
              np.r_[VERTEX, 60, log_energy, DIRECTION], np.r_[VERTEX, 0, log_energy - np.log(2), DIRECTION]]
    for _ in range(20):
        _, sensor, time, _ = cascade_light(rng, detector, *cascades(1))
        score = CascadePosterior(detector, sensor, time, VERTEX, 2_000.)(np.stack([true, *others]))
        better += (score[1:] < score[0]).sum()
    assert better >= 76


def test_dark_doms_in_the_probability(detector, expectation):
    "With and without them, probabilities differ by their light and the condition that hit DOMs are hit."
    _, sensor, time, _ = cascade_light(np.random.default_rng(3), detector, *cascades(1))
    every, lit = (CascadePosterior(detector, sensor, time, VERTEX, 2_000., dark) for dark in (True, False))
    mu = expectation[np.unique(sensor)]
    assert len(lit.xyz) == len(mu)
    theta = np.r_[VERTEX, 0., np.log(2_000.), DIRECTION][None]
    expected = (expectation.sum() - mu.sum()) - np.log(-np.expm1(-mu)).sum()
    assert np.isclose(lit(theta)[0] - every(theta)[0], expected, atol=0.05)


def test_cascades_have_the_light_of_their_event(detector):
    "Eight photo-electrons or more, near the vertex."
    found = observed_cascades(np.random.default_rng(0), detector, 40)
    assert all(len(c["sensor"]) >= 8 and len(c["sensor"]) == len(c["time"]) for c in found)
    far = [np.linalg.norm(detector.xyz[c["sensor"]] - c["vertex"], axis=1).mean() for c in found]
    assert np.median(far) < 100


@pytest.mark.slow
def test_limit_of_a_cascade(detector):
    "Both halves of the steps agree for a cascade near a string."
    _, sensor, time, _ = cascade_light(np.random.default_rng(4), detector, *cascades(1, 300.))
    found = cascade_limit(detector, {"direction": DIRECTION, "vertex": VERTEX, "energy": 300.,
                                     "sensor": sensor, "time": time})
    assert found["limit"] < 3 * found["expected"] < 60
    assert found["halves"] < 10
