"""The law of light that is learned from the cascades of a data set: likelihood, draws, and other ice."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import call

from iceaggr.data import IceCubeDataset
from iceaggr.geometry import SPEED_OF_LIGHT
from iceaggr.simulation import light as simulation
from iceaggr.simulation.dataset import make_detector, simulate_dataset
from iceaggr.simulation.neutrinos import isotropic

SCRIPTS = Path(__file__).parents[1] / "data_scripts"


@pytest.fixture
def learn_light(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import learn_light
    return learn_light


def read_cascades(data):
    "Truth and pulses of the cascades of file 1."
    pulses, truth = sys.modules["event_files"].read_events(data, [1])
    start = np.searchsorted(pulses.event, np.arange(len(truth) + 1))
    return [(truth.iloc[e], pulses[start[e]:start[e + 1]]) for e in np.flatnonzero(truth.type == "cascade")]


@pytest.fixture
def six_cascades(learn_light, tmp_path):
    data = simulate_dataset(tmp_path / "six", 30, seed=3, events_per_file=30, progress=False, mix="cascades")
    return read_cascades(data)[:6]


def expected_centre(detector, position, u, energy):
    "The simulation's expectation for a cascade at each DOM: mu, shape, scale, distance."
    centre = position + simulation.shower_maximum(energy)[:, None] * u
    metres = simulation.METRES_PER_GEV * energy
    return simulation.cascade_expectation(
        detector.ice, centre, u, metres, detector.xyz, detector.efficiency)


# The likelihood

def rates_of_pulses(cascade, mu, shares, edges):
    "Expected photo-electrons per nanosecond at each pulse."
    rates = []
    for row, time in zip(cascade.hit.tolist(), cascade.time.double().tolist(), strict=True):
        k = np.searchsorted(edges, time, side="right") - 1
        inside = 0 <= k < len(edges) - 1
        width = edges[k + 1] - edges[k] if inside else 1
        rates.append(mu[cascade.lit[row]] * shares[row, k] / width if inside else 0.)
    return np.array(rates)


def expected_light(cascade, mu, shares, edges):
    "Photo-electrons that can be recorded, DOM by DOM."
    total = 0.
    for dom in range(len(mu)):
        row = np.flatnonzero(cascade.lit.numpy() == dom)
        if not len(row):
            total += mu[dom]
        elif cascade.single[row[0]]:  # blind after its charge stamp
            end = cascade.time[cascade.hit == row[0]].min().item() + 75
            part = np.clip((end - edges[:-1]) / np.diff(edges), 0, 1)
            total += mu[dom] * (shares[row[0]] * part).sum()
        else:
            total += mu[dom] * shares[row[0]].sum()
    return total


def test_likelihood(learn_light, six_cascades):
    "As computed pulse by pulse and DOM by DOM in float64, whatever else is in the batch."
    detector, law = make_detector(), learn_light.Light()
    cascades = [learn_light.Cascade(detector, *event) for event in six_cascades]
    torch.manual_seed(0)
    for last in (law.amount[-1], law.delay[-1]): torch.nn.init.normal_(last.weight, std=0.3)
    with torch.no_grad():
        together = learn_light.log_likelihood(law, cascades)
        separate = torch.cat([learn_light.log_likelihood(law, [c]) for c in cascades])
    assert torch.allclose(together, separate, rtol=1e-4, atol=1e-2)
    edges, double, steady = learn_light.EDGES, law.double(), learn_light.STEADY
    for (_, pulses), cascade, value in zip(six_cascades, cascades, together, strict=True):
        mu = double.expected(cascade.x.double(), cascade.mu.double()).detach().numpy()
        shares = double.shares(cascade.x[cascade.lit].double(), cascade.prior.double()) @ double.late
        shares = shares.detach().numpy()
        rate = rates_of_pulses(cascade, mu, shares, edges)
        expected = expected_light(cascade, mu, shares, edges)
        charge = cascade.charge.numpy().astype(float)
        signal = (charge * rate / (rate + learn_light.NOISE)).sum()
        brightness = (signal + steady) / (expected + steady)
        reference = (charge * np.log1p(brightness * rate / learn_light.NOISE)).sum() - brightness * expected
        assert value.item() == pytest.approx(reference, rel=1e-3, abs=0.05)
        auxiliary_only = {s for s, p in pulses.groupby("sensor_id") if p.auxiliary.all()}
        assert cascade.single.sum() <= len(auxiliary_only)
        assert all((cascade.hit == row).sum() == 1 for row in np.flatnonzero(cascade.single))


def settled(learn_light, law, cascades, first):
    "Times and log-likelihoods of cascades after twelve updates from a first time."
    for cascade in cascades: cascade.zero = first
    with torch.no_grad():
        for _ in range(12): learn_light.log_likelihood(law, cascades, update=True)
        return np.array([c.zero for c in cascades]), learn_light.log_likelihood(law, cascades).numpy()


def test_times(learn_light, six_cascades):
    "A cascade that is put too early or too late finds back to the most probable time."
    detector, law = make_detector(), learn_light.Light()
    cascades = [learn_light.Cascade(detector, *event) for event in six_cascades]
    early, low = settled(learn_light, law, cascades, -15.)
    late, high = settled(learn_light, law, cascades, 15.)
    for cascade in cascades: cascade.zero = 30.
    with torch.no_grad(): far = learn_light.log_likelihood(law, cascades).numpy()
    assert np.abs(early - late).max() < 4
    assert (np.minimum(low, high) > far + 2).all()


def test_cascade_without_pulses(learn_light, six_cascades):
    "It counts the light that was to be expected."
    detector, law, steady = make_detector(), learn_light.Light(), learn_light.STEADY
    truth, pulses = six_cascades[0]
    empty, other = (learn_light.Cascade(detector, truth, p) for p in (pulses[:0], pulses))
    with torch.no_grad(): value = learn_light.log_likelihood(law, [empty, other])[0].item()
    expected = empty.mu.double().sum().item()
    assert len(empty.lit) == 0
    assert value == pytest.approx(-expected * steady / (expected + steady), rel=0.01)


# Light drawn from a law

@pytest.mark.slow
def test_draws_of_an_untrained_law(learn_light):
    "Counts are those that the simulation expects, delays have the shares of their bins."
    detector, law, rng, n = make_detector(dead_doms=0), learn_light.Light(), np.random.default_rng(0), 400
    position, u = np.tile([30., 20., -320.], (n, 1)), np.tile([0., 0.6, 0.8], (n, 1))
    energy, start = np.full(n, 2_000.), rng.uniform(0, 1e4, n)
    source, sensor, time, weight = law.cascade_light(rng, detector, position, u, start, energy)
    mu, shape, scale, r = expected_centre(detector, position[:1], u[:1], energy[:1])
    drawn = np.bincount(sensor, weight, 5160) / n
    bright = mu > 0.05
    assert bright.sum() > 50
    assert np.abs((drawn - mu) / np.sqrt(mu / n))[bright].max() < 5
    assert drawn[mu < 1e-4].sum() < 1
    when = start + simulation.shower_maximum(energy) / SPEED_OF_LIGHT
    for dom in np.argsort(-mu)[[0, 3, 10, 30]]:
        arrival = when[source] + simulation.GROUP_INDEX * r[dom] / SPEED_OF_LIGHT
        delay = (time - arrival)[sensor == dom]
        share = learn_light.prior_bins(shape[[dom]], scale[[dom]])[0]
        found = np.cumsum(np.histogram(delay, learn_light.EDGES)[0]) / len(delay)
        assert np.abs(found - np.cumsum(share) / share.sum()).max() < 1.7 / np.sqrt(len(delay))
    assert len(law.cascade_light(rng, detector, position[:0], u[:0], start[:0], energy[:0])[0]) == 0


def test_bright_cascades_have_weights(learn_light):
    "Photo-electrons beyond those drawn go into the weights."
    detector, law, rng = make_detector(dead_doms=0), learn_light.Light(), np.random.default_rng(0)
    position, u, energy = np.array([[30., 20., -320.]]), np.array([[0., 0.6, 0.8]]), np.array([1e6])
    _, sensor, _, weight = law.cascade_light(rng, detector, position, u, np.zeros(1), energy)
    mu, _, _, _ = expected_centre(detector, position, u, energy)
    assert weight.max() > 1
    assert np.bincount(sensor).max() <= simulation.MAX_PE
    assert weight.sum() == pytest.approx(mu.sum(), rel=0.03)


# The whole script

@pytest.mark.slow
def test_other_ice_is_found(learn_light, tmp_path, monkeypatch):
    "The law learned in ice that absorbs more gives less light far away, by as much."
    distances = np.array([30., 120.])
    with monkeypatch.context() as other:
        other.setattr(simulation, "ABSORPTION_SCALE", 0.45)
        data = simulate_dataset(tmp_path / "data", 1_200, seed=4, events_per_file=1_200, workers=1,
                                progress=False, mix="cascades")
        dim = simulation.point_fluence(distances, 30., 120.)
    plain = simulation.point_fluence(distances, 30., 120.)
    detector = make_detector()
    cascades = [learn_light.Cascade(detector, *event) for event in read_cascades(data)]
    law = learn_light.fitted(cascades, 8, 0)
    rng, n, ratio = np.random.default_rng(0), 4_000, []
    for distance in distances:
        centre, look = rng.uniform([-200, -200, -400], [200, 200, 400], (n, 3)), isotropic(rng, n)
        xyz = centre + distance * isotropic(rng, n)
        optics = detector.ice.average(centre[:, 2], xyz[:, 2])
        x = learn_light.light_features(centre, look, np.full(n, 2_000.), xyz, np.full(n, distance), optics)
        ratio.append(law.expected(torch.from_numpy(x), torch.ones(n)).log().mean().item())
    expected = np.log(dim / plain)
    assert ratio[1] - ratio[0] == pytest.approx(expected[1] - expected[0], rel=0.25)


@pytest.fixture
def learn(tmp_path):
    "Function that runs the script on a small data set."
    data = simulate_dataset(tmp_path / "data", 40, seed=5, events_per_file=40, progress=False, mix="cascades")
    def run(out, *options):
        return call(data, tmp_path / out, "--files", "1", *options, script=SCRIPTS / "learn_light.py")
    return run


@pytest.mark.slow
def test_data_set_with_a_learned_law(learn, tmp_path):
    "Pulses are the same with the same seed and law; kinds and numbers are those asked for."
    law = tmp_path / "law.safetensors"
    sizes = ("--events", 50, "--per-file", 30)
    done = learn("first", "--epochs", 1, *sizes, "--law", law)
    assert done.returncode == 0, done.stderr
    assert law.read_bytes() == (tmp_path / "first/light.safetensors").read_bytes()
    assert "epoch 1:" in done.stdout + done.stderr
    first, truth = IceCubeDataset(tmp_path / "first"), pd.read_parquet(tmp_path / "first/truth.parquet")
    assert len(first) == 50
    assert truth.batch_id.value_counts().to_dict() == {1: 30, 2: 20}
    assert truth.type.nunique() == 3
    again = learn("again", "--law", law, *sizes)
    assert again.returncode == 0, again.stderr
    assert "epoch 1:" not in again.stdout + again.stderr
    for a, b in zip(first, IceCubeDataset(tmp_path / "again"), strict=True):
        assert torch.equal(a["pulse_features"], b["pulse_features"])
        assert torch.equal(a["target"], b["target"])
    assert learn("cascades", "--law", law, "--events", 100, "--mix", "cascades").returncode == 0
    assert (pd.read_parquet(tmp_path / "cascades/truth.parquet").type == "cascade").mean() > 0.5
    assert "already" in learn("first").stderr


def test_bad_requests_make_nothing(learn, tmp_path):
    "Numbers, files, laws and data without cascades are refused before anything is made."
    law, truth_file = tmp_path / "law.safetensors", tmp_path / "data/truth.parquet"
    assert "at least" in learn("none", "--epochs", 0).stderr
    assert "no events of a file 7" in learn("none", "--files", "7").stderr
    law.write_bytes(b"damaged")
    assert "law.safetensors holds no law" in learn("none", "--law", law).stderr
    assert law.read_bytes() == b"damaged"
    pd.read_parquet(truth_file).assign(type="track_through").to_parquet(truth_file)
    assert "no cascade" in learn("none").stderr
    assert not (tmp_path / "none").exists()
