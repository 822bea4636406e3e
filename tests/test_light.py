"""The law of light that is learned from the cascades of a data set: its likelihood, what is drawn from it, and that it finds other ice."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from iceaggr.simulation import light as simulation
from iceaggr.simulation.neutrinos import isotropic
from iceaggr.data import IceCubeDataset
from iceaggr.geometry import SPEED_OF_LIGHT
from iceaggr.simulation.dataset import make_detector, simulate_dataset
from processes import call

SCRIPTS = Path(__file__).parents[1] / "data_scripts"


@pytest.fixture
def learn_light(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import learn_light
    return learn_light


def read(learn_light, data):
    pulses, truth = sys.modules["event_files"].read_events(data, [1])
    start = np.searchsorted(pulses.event, np.arange(len(truth) + 1))
    return [(truth.iloc[e], pulses[start[e]:start[e + 1]]) for e in np.flatnonzero(truth.type == "cascade")]


def test_likelihood(learn_light, tmp_path):
    "As worked out pulse by pulse and DOM by DOM in float64, whatever else is in the batch."
    detector = make_detector()
    found = read(learn_light, simulate_dataset(tmp_path / "data", 30, seed=3, events_per_file=30, progress=False, mix="cascades"))[:6]
    cascades, law = [learn_light.Cascade(detector, *event) for event in found], learn_light.Light()
    torch.manual_seed(0)
    for last in (law.amount[-1], law.delay[-1]): torch.nn.init.normal_(last.weight, std=0.3)
    with torch.no_grad(): together, alone = learn_light.log_likelihood(law, cascades), torch.cat([learn_light.log_likelihood(law, [c]) for c in cascades])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-2)
    edges, double = learn_light.EDGES, law.double()
    for (truth, pulses), cascade, value in zip(found, cascades, together):
        mu = double.expected(cascade.x.double(), cascade.mu.double()).detach().numpy()
        shares = (double.shares(cascade.x[cascade.lit].double(), cascade.prior.double()) @ double.late).detach().numpy()
        rate, expected = [], mu.sum() * 0
        for row, time in zip(cascade.hit.tolist(), cascade.time.double().tolist()):
            k = np.searchsorted(edges, time, side="right") - 1
            rate.append(mu[cascade.lit[row]] * shares[row, k] / (edges[k + 1] - edges[k]) if 0 <= k < len(edges) - 1 else 0.)
        for dom in range(len(mu)):
            row = np.flatnonzero(cascade.lit.numpy() == dom)
            if not len(row): expected += mu[dom]; continue
            row = row[0]
            if cascade.alone[row]:
                first = cascade.time[cascade.hit == row].min().item() + 75
                expected += mu[dom] * sum(s * np.clip((first - a) / (b - a), 0, 1) for s, a, b in zip(shares[row], edges[:-1], edges[1:]))
            else: expected += mu[dom] * shares[row].sum()
        rate, charge = np.array(rate), cascade.charge.numpy().astype(float)
        brightness = ((charge * rate / (rate + learn_light.NOISE)).sum() + learn_light.STEADY) / (expected + learn_light.STEADY)
        reference = (charge * np.log1p(brightness * rate / learn_light.NOISE)).sum() - brightness * expected
        assert value.item() == pytest.approx(reference, rel=1e-3, abs=0.05)
        lonely = {s for s, p in pulses.groupby("sensor_id") if p.auxiliary.all()}
        assert cascade.alone.sum() <= len(lonely) and all((cascade.hit == row).sum() == 1 for row in np.flatnonzero(cascade.alone))


def test_shine(learn_light):
    "What an unlearned law draws has the counts that the simulation expects, and delays in the shares of its bins; the time of the source and the way that the light takes are in the times."
    detector, law, rng, n = make_detector(dead_doms=0), learn_light.Light(), np.random.default_rng(0), 400
    position, u, energy = np.tile([30., 20., -320.], (n, 1)), np.tile([0., 0.6, 0.8], (n, 1)), np.full(n, 2_000.)
    start = rng.uniform(0, 1e4, n)
    source, sensor, time, weight = law.shine(rng, detector, position, u, start, energy)
    centre, when = position + simulation.shower_maximum(energy)[:, None] * u, start + simulation.shower_maximum(energy) / SPEED_OF_LIGHT
    doms = np.arange(5160)
    mu, shape, scale, r = simulation.cascade_expectation(detector.ice, centre[:1], u[:1], simulation.METRES_PER_GEV * energy[:1], detector.xyz, detector.efficiency)
    drawn = np.bincount(sensor, weight, 5160) / n
    bright = mu > 0.05
    assert bright.sum() > 50 and np.abs((drawn - mu) / np.sqrt(mu / n))[bright].max() < 5 and drawn[mu < 1e-4].sum() < 1
    for dom in doms[np.argsort(-mu)[[0, 3, 10, 30]]]:
        delay = (time - when[source] - simulation.GROUP_INDEX * r[dom] / SPEED_OF_LIGHT)[sensor == dom]
        share = learn_light.prior_bins(shape[[dom]], scale[[dom]])[0]
        assert np.abs(np.cumsum(np.histogram(delay, learn_light.EDGES)[0]) / len(delay) - np.cumsum(share) / share.sum()).max() < 1.7 / np.sqrt(len(delay))
    assert len(law.shine(rng, detector, position[:0], u[:0], start[:0], energy[:0])[0]) == 0
    pev = np.full(1, 1e6)                                                                                               # photo-electrons beyond those drawn go into the weights
    _, sensor, _, weight = law.shine(rng, detector, position[:1], u[:1], start[:1], pev)
    mu = simulation.cascade_expectation(detector.ice, position[:1] + simulation.shower_maximum(pev)[:, None] * u[:1], u[:1], simulation.METRES_PER_GEV * pev, detector.xyz, detector.efficiency)[0]
    assert weight.max() > 1 and np.bincount(sensor).max() <= 2_000 and weight.sum() == pytest.approx(mu.sum(), rel=0.03)


def test_times_and_empty_cascades(learn_light, tmp_path):
    "A cascade that is put too late finds back to the time that is most probable; one without pulses counts the light that was to be expected."
    detector, law = make_detector(), learn_light.Light()
    found = read(learn_light, simulate_dataset(tmp_path / "data", 30, seed=3, events_per_file=30, progress=False, mix="cascades"))[:6]
    cascades = [learn_light.Cascade(detector, *event) for event in found]
    def settled(first): # times and log-likelihood
        for c in cascades: c.zero = first
        with torch.no_grad():
            for _ in range(12): learn_light.log_likelihood(law, cascades, update=True)
            return np.array([c.zero for c in cascades]), learn_light.log_likelihood(law, cascades).numpy()
    (early, low), (late, high) = settled(-15.), settled(15.)
    for c in cascades: c.zero = 30.
    with torch.no_grad(): far = learn_light.log_likelihood(law, cascades).numpy()
    assert np.abs(early - late).max() < 4 and (np.minimum(low, high) > far + 2).all()
    truth, pulses = found[0]
    empty = learn_light.Cascade(detector, truth, pulses[:0])
    with torch.no_grad(): value, expected = learn_light.log_likelihood(law, [empty, cascades[0]])[0].item(), empty.mu.double().sum().item()
    assert len(empty.lit) == 0 and value == pytest.approx(-expected * learn_light.STEADY / (expected + learn_light.STEADY), rel=0.01)


def test_other_ice_is_found(learn_light, tmp_path, monkeypatch):
    "Of cascades in ice that absorbs more than the law says, the law that is learned gives less light far away, by as much."
    with monkeypatch.context() as other:
        other.setattr(simulation, "ABSORPTION_SCALE", 0.45)
        data = simulate_dataset(tmp_path / "data", 1_200, seed=4, events_per_file=1_200, workers=1, progress=False, mix="cascades")
        dim = simulation.point_fluence(np.array([30., 120.]), 30., 120.)
    plain = simulation.point_fluence(np.array([30., 120.]), 30., 120.)
    detector = make_detector()
    law = learn_light.fitted([learn_light.Cascade(detector, *event) for event in read(learn_light, data)], 8, 0)
    rng, n = np.random.default_rng(0), 4_000
    ratio = []
    for distance in (30., 120.):
        centre, look = rng.uniform([-200, -200, -400], [200, 200, 400], (n, 3)), isotropic(rng, n)
        xyz = centre + distance * isotropic(rng, n)
        x = torch.from_numpy(learn_light.light_features(centre, look, np.full(n, 2_000.), xyz, np.full(n, distance), detector.ice.average(centre[:, 2], xyz[:, 2])))
        ratio.append(law.expected(x, torch.ones(n)).log().mean().item())
    wanted = np.log(dim / plain)
    assert ratio[1] - ratio[0] == pytest.approx(wanted[1] - wanted[0], rel=0.25)


def test_data_set(tmp_path):
    "Pulses are the same with the same seed and law; all can be read; kinds and numbers are those asked for; bad requests are refused before anything is made."
    data = simulate_dataset(tmp_path / "data", 40, seed=5, events_per_file=40, progress=False, mix="cascades")
    learn = lambda out, *options: call(data, tmp_path / out, "--files", "1", *options, script=SCRIPTS / "learn_light.py")
    law = tmp_path / "law.safetensors"
    done = learn("first", "--epochs", 1, "--events", 50, "--per-file", 30, "--law", law)
    assert done.returncode == 0, done.stderr
    assert law.read_bytes() == (tmp_path / "first/light.safetensors").read_bytes() and "epoch 1:" in done.stdout + done.stderr
    first = IceCubeDataset(tmp_path / "first")
    truth = pd.read_parquet(tmp_path / "first/truth.parquet")
    assert len(first) == 50 and truth.batch_id.value_counts().to_dict() == {1: 30, 2: 20} and truth.type.nunique() == 3
    again = learn("again", "--law", law, "--events", 50, "--per-file", 30)
    assert again.returncode == 0 and "epoch 1:" not in again.stdout + again.stderr, again.stderr
    for a, b in zip(first, IceCubeDataset(tmp_path / "again")): assert torch.equal(a["pulse_features"], b["pulse_features"]) and torch.equal(a["target"], b["target"])
    assert learn("cascades", "--law", law, "--events", 100, "--mix", "cascades").returncode == 0
    assert (pd.read_parquet(tmp_path / "cascades/truth.parquet").type == "cascade").mean() > 0.5
    assert "at least" in learn("none", "--epochs", 0).stderr and "already" in learn("first").stderr and "no events of a file 7" in learn("none", "--files", "7").stderr
    law.write_bytes(b"damaged")
    assert "law.safetensors holds no law" in learn("none", "--law", law).stderr and law.read_bytes() == b"damaged"
    truth = pd.read_parquet(data / "truth.parquet")
    truth.assign(type="track_through").to_parquet(data / "truth.parquet")
    assert "no cascade" in learn("none").stderr and not (tmp_path / "none").exists()
