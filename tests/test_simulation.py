"""Simulated events: neutrinos, light, read-out, and the data sets made of them."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from processes import launch

from iceaggr.data import IceCubeDataset
from iceaggr.geometry import (
    N_SENSORS,
    SPEED_OF_LIGHT,
    Geometry,
    default_efficiency,
    ice_optics,
    load_geometry,
)
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation import dataset, light, neutrinos, readout
from iceaggr.simulation.dataset import demo_dataset, make_detector, simulate_dataset, simulate_events
from iceaggr.simulation.light import Detector
from iceaggr.simulation.neutrinos import HARD, ION_LOSS, KINDS, SOFT, SimulationSettings, sample_neutrinos
from iceaggr.simulation.readout import AFTER_PULSES, LATE_SHARE, SPAN, TRIGGER_TIME, read_out

DOUBLE_CASCADE, BUNDLE = KINDS.index("double_cascade"), KINDS.index("muon_bundle")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def detector():
    return Detector(load_geometry())


# Neutrinos

def test_directions(rng):
    "Isotropic directions have no mean; rotation is by the angle asked for; angles are those of the origin."
    u = neutrinos.isotropic(rng, 20_000)
    rotated = neutrinos.rotate(rng, u, np.full(len(u), 0.1))
    assert np.allclose((u * rotated).sum(1), np.cos(0.1))
    assert np.abs(u.mean(0)).max() < 0.02
    azimuth, zenith = neutrinos.arrival_angles(np.array([[0.0, 0, -1], [-1, 0, 0]]))
    assert np.allclose(zenith, [0, np.pi / 2])
    assert np.isclose(azimuth[1], 0)


def test_muons_enter_through_the_surface_of_the_cylinder(rng):
    "Points of entry lie on the surface; one metre further on, lines are inside."
    u = neutrinos.isotropic(rng, 20_000)
    entry = neutrinos._cylinder_entry(rng, u)
    radius, half = neutrinos.RADIUS, neutrinos.HALF_HEIGHT
    rho, height = np.hypot(entry[:, 0], entry[:, 1]), np.abs(entry[:, 2])
    on_side = np.isclose(rho, radius) & (height <= half + 1e-6)
    on_cap = np.isclose(height, half) & (rho <= radius + 1e-6)
    assert (on_side | on_cap).all()
    inside = entry + u
    contained = (np.hypot(inside[:, 0], inside[:, 1]) < radius) & (np.abs(inside[:, 2]) < half)
    assert np.mean(contained) > 0.99


WRONG = [{"mix": "all"}, {"bundles": 1.1}, {"directions": "up"}, {"energy": (5, 1)}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_are_refused(wrong):
    "The message names the setting."
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}|shares"): SimulationSettings(**wrong)


def test_kinds_on_request(rng):
    "Shares add up; bundles have two muons or more and fly down; taus have 100 TeV or more."
    settings = SimulationSettings(double_cascades=0.2, bundles=0.3)
    assert np.isclose(sum(settings.shares), 1)
    assert settings.shares[3:] == (0.2, 0.3)
    assert min(SimulationSettings(double_cascades=0.9, bundles=0.1).shares) >= 0
    bundles = sample_neutrinos(rng, 2_000, BUNDLE, settings)
    assert (bundles["n_muons"] >= 2).all()
    assert (bundles["direction"][:, 2] < 0).all()
    assert (sample_neutrinos(rng, 100, DOUBLE_CASCADE, settings)["energy"] >= 1e5).all()
    assert (sample_neutrinos(rng, 100, KINDS.index("cascade"), settings)["n_muons"] == 0).all()


def test_atmospheric_directions_follow_the_flux(rng):
    "Directions drawn have the density of the flux; the Earth absorbs 10 PeV."
    cosine = np.linspace(-1, 1, 401)
    for energy in (300.0, 3e4, 1e6):
        weight = neutrinos._atmospheric_weight(cosine, np.array([energy]))
        drawn = -neutrinos._atmospheric(rng, np.full(40_000, energy))[:, 2]
        density = np.histogram(drawn, 20, (-1, 1))[0] / 2_000
        expected = weight[:-1].reshape(20, 20).mean(1) / weight.mean()
        # energies share a grid of ten per decade
        assert np.abs(density - expected).max() < 0.25 * expected.max(), energy
    up, down = (neutrinos._atmospheric_weight(np.array([c]), np.array([1e7]))[0] for c in (-1.0, 1.0))
    assert up < 1e-4 * down


def test_muons_lose_energy(rng):
    "Losses add up to a + bE on average; the range at low energy is that of ionisation."
    nodes, energies, _ = neutrinos.propagate_muons(rng, np.full(3000, 1000.0), 500.0)
    total_b = HARD["b"] + SOFT["b"]
    expected = (1000 + ION_LOSS / total_b) * np.exp(-total_b * 500) - ION_LOSS / total_b
    assert (np.diff(energies, axis=1) <= 1e-9).all()
    assert (energies >= 0).all()
    assert abs(energies[:, -1].mean() / expected - 1) < 0.03
    nodes, energies, _ = neutrinos.propagate_muons(rng, np.full(500, 20.0))
    assert abs(np.median(neutrinos.muon_length(nodes, energies)) - 20 / ION_LOSS) < 4


def test_taus_decay_on_their_line(rng):
    "Decay length and visible energy have their means; time and place agree."
    taus = sample_neutrinos(rng, 4_000, DOUBLE_CASCADE, SimulationSettings())
    k, position, _, time, energy = neutrinos.tau_decays(rng, taus)
    tau = (1 - taus["inelasticity"]) * taus["energy"]
    flight = np.linalg.norm(position - taus["vertex"], axis=1)
    assert np.array_equal(k, np.arange(4_000))
    assert np.allclose(flight, time * SPEED_OF_LIGHT)
    assert abs((flight / tau).mean() / neutrinos.TAU_LENGTH - 1) < 0.06
    assert (energy < tau).all()
    assert abs((energy / tau).mean() - 0.6) < 0.02


# Light

def test_ice_averages(rng):
    "Harmonic means by tables are those of a fine sum over the path."
    z1, z2 = rng.uniform(-500, 500, (2, 20))
    averages = light.LayeredIce().average(z1, z2)
    for i in range(20):
        if abs(z2[i] - z1[i]) < 10: continue
        z = z1[i] + np.linspace(0, 1, 2001) * (z2[i] - z1[i])
        factor = np.interp(z, *light._CLARITY)
        for length, average in zip(ice_optics(z), averages, strict=True):
            assert abs(1 / np.mean(1 / (factor * length)) / average[i] - 1) < 0.02


PLACES = np.array([[0., 0., -300.], [100., 50., 0.], [-80., 20., 250.]])


def test_ice_without_a_variation_is_the_standard_one(detector):
    "Bit for bit, and the same DOMs."
    same = detector.varied(light.IceVariation())
    assert np.array_equal(same.efficiency, detector.efficiency)
    paths = PLACES, PLACES[::-1]
    assert np.array_equal(same.ice.between(*paths), detector.ice.between(*paths))
    assert np.array_equal(detector.ice.between(*paths), detector.ice.average(PLACES[:, 2], PLACES[::-1, 2]))


def test_variations_of_the_ice(detector):
    "Each one changes what it says, by as much as it says."
    start = np.zeros((3, 3)) + [0, 0, 300.]
    along, across = (300 * np.array([np.cos(a), np.sin(a), 0]) for a in (light.FLOW, light.FLOW + np.pi / 2))
    end = start + [along, across, [0, 0, 100.]]
    standard = np.array(light.LayeredIce().between(start, end))
    found = np.array(light.LayeredIce(light.IceVariation(anisotropy=0.1)).between(start, end))
    assert np.allclose(found / standard, np.exp([0.1, -0.1, 0]))
    longer = light.IceVariation(scattering=(0.2,) * 5)
    found = np.array(light.LayeredIce(longer).between(start, end))
    assert np.allclose(found / standard, np.exp([[0.2] * 3, [0] * 3]))
    tilted = light.LayeredIce(light.IceVariation(tilt=0.1))
    up = np.array(tilted.between(start + along, start + along))
    assert np.allclose(up, light.LayeredIce().between(start - [0, 0, 30.], start - [0, 0, 30.]))
    dust = np.array(light.LayeredIce(light.IceVariation(dust=0.5)).between(start, end))
    assert np.allclose(dust, standard, rtol=1e-6)                    # far above the dust layer
    bright = detector.varied(light.IceVariation(efficiency=1.1))
    assert np.allclose(bright.efficiency, 1.1 * detector.efficiency)
    def mu(hole_ice): # of light that goes straight up
        ice = light.LayeredIce(light.IceVariation(hole_ice=hole_ice))
        return light.cascade_expectation(ice, start[0], along / 300, 1e3, start[0] + [0, 0, 60.], 1.)[0]
    assert mu(1.2) > mu(1.0) > mu(0.8)


def test_drawn_ice_belongs_to_the_seed():
    "The same events for the same seed; other light than in the standard ice."
    options = dict(mix="cascades", energy=(5e3, 1e4))
    one, again = (simulate_events(20, seed=3, unknown_ice=True, **options)[0] for _ in range(2))
    assert one.equals(again) and not one.equals(simulate_events(20, seed=3, **options)[0])
    spread = [light.draw_variation(np.random.default_rng(k)) for k in range(400)]
    assert abs(np.std([np.log(v.efficiency) for v in spread]) - 0.1) < 0.02
    assert abs(np.std([v.absorption for v in spread]) - np.hypot(0.05, 0.05)) < 0.01


@pytest.mark.slow
def test_whole_range_has_as_many_events_per_decade_of_light():
    n = simulate_events(400, seed=0, mix="whole_range")[0].groupby("event_id").size()
    shares = np.histogram(n, [30, 300, 3_000, 30_000])[0] / len(n)
    assert (shares > 0.2).all()


def test_fluence_limits():
    "In clear ice fluence is 1/r^2 for a point and 1/d for a track; in ice it falls with distance."
    r = np.geomspace(1, 400, 100)
    near = r < 5
    point = light.point_fluence(r, 1e4, 1e9) / light.near_light(r, light.NEAR_POINT)
    track = light.track_fluence(r, 1e6, 1e9) / light.near_light(r)
    assert np.allclose(point[near], 1 / (4 * np.pi * r[near]**2), rtol=0.1)
    assert np.allclose(track[near], 1 / (2 * np.pi * light.SIN_C * r[near]), rtol=0.1)
    assert (np.diff(light.point_fluence(r, 30, 110)) < 0).all()
    assert (np.diff(light.track_fluence(r, 30, 110)) < 0).all()


@pytest.mark.parametrize("distance", [1.0, 30.0, 200.0])
def test_scattering_makes_no_light(distance):
    "The mean over all directions stays 1."
    cosine = np.linspace(-1, 1, 2001)
    profile = light.cascade_profile(cosine, np.full_like(cosine, distance), np.full_like(cosine, 30.0))
    assert abs(profile.mean() - 1) < 0.02
    assert abs(light.dom_acceptance(cosine, distance, 30.0).mean() - 1) < 0.02


@pytest.mark.parametrize("s, d", [(100.0, 10.0), (350.0, 80.0), (40.0, 5.0)])
def test_unscattered_arrival(monkeypatch, s, d):
    "The closed form is the earliest arrival over all points of emission."
    # one index for both: with a larger group index the cone decides, not the earliest time
    monkeypatch.setattr(light, "GROUP_INDEX", light.PHASE_INDEX)
    emission = np.linspace(-200, s, 400_001)
    arrival = (emission + light.PHASE_INDEX * np.hypot(s - emission, d)) / SPEED_OF_LIGHT
    assert abs(arrival.min() - light.track_time(s, d)) < 0.01


def test_delays(rng):
    "Light is later than the muon; head-on into the PMT is earliest; the onset has its mean."
    assert light.track_time(100.0, 30.0) > 100 / SPEED_OF_LIGHT
    assert abs(np.degrees(np.arccos(light.COS_C)) - 41) < 0.5
    kz, far = np.array([-1.0, 0, 1]), np.full(3, 100.0)
    for shape in (light.cascade_delay(far, np.full(3, 0.5), kz, 33.0, 98.0)[0],
                  light.track_delay(far, kz, 33.0, 98.0)[0]):
        assert (np.diff(shape) < 0).all()
        assert (shape > 0).all()
    for distance, mean in ((0.0, 2.5), (50.0, 2.5 + 48 * 0.5**1.1), (100.0, 50.5)):
        onset = light._onset_delay(rng, light.onset_mean(np.full(100_000, distance)))
        assert (onset > 0).all()
        assert abs(onset.mean() / mean - 1) < 0.02


def test_photons_of_a_pair(rng):
    "Counts and delays have their means; more light than is drawn goes into the weights."
    d = np.array([10.0, 40, 100])
    shape, scale = light.track_delay(d, np.zeros(3), np.full(3, 33.0), np.full(3, 98.0))
    pair, zero = np.zeros(1, int), np.zeros(1)
    for k in range(3):
        law = shape[k:k + 1], scale[k:k + 1], d[k:k + 1]
        _, _, delay, weight = light.draw_photons(rng, pair, pair, zero, np.full(1, 1500.0), *law)
        mean = shape[k] * scale[k] + light.onset_mean(d[k])
        assert (weight == 1).all()
        assert abs(len(delay) - 1500) < 200
        assert abs(delay.mean() / mean - 1) < 0.15
    _, _, time, weight = light.draw_photons(rng, pair, pair, zero, np.full(1, 1e5), *law)
    assert len(time) == light.MAX_PE
    assert abs(weight.sum() / 1e5 - 1) < 0.02


def test_light_of_vertical_muons(rng, detector):
    "Near by, a muon that goes up gives more light than one that goes down; far away nearly the same."
    def total(up, distance):
        x, y = detector.xy[35] + distance / math.sqrt(2)
        start, u = np.tile([x, y, -700.0 * up], (40, 1)), np.tile([0, 0, float(up)], (40, 1))
        nodes, energies, _ = neutrinos.propagate_muons(np.random.default_rng(0), np.array([1000.0]))
        nodes, energies = np.repeat(nodes, 40, 0), np.repeat(energies, 40, 0)
        _, sensor, _, weight = light._track_light(rng, detector, start, u, np.zeros(40), nodes, energies)
        return weight[np.isin(sensor, detector.dom_of[35])].sum()
    assert 1.8 < total(1, 5.0) / total(-1, 5.0) < 4.5
    assert 0.8 < total(1, 80.0) / total(-1, 80.0) < 1.35


def test_light_of_a_track_is_that_of_its_length(rng, detector):
    "Ends move light and make none: muons of 5 and 50 GeV give as much per metre."
    emission = np.arange(-400, 1_400, 0.01)
    for length in (0.5, 20.0, 800.0):
        share = light.end_share(emission, length)
        assert share.min() >= 0
        assert abs(share.sum() * 0.01 / length - 1) < 0.01
    assert np.allclose(light.end_share(np.array([400.0]), 800.0), 1)
    per_metre = []
    for energy in (5.0, 50.0):
        events = sample_neutrinos(rng, 1_000, KINDS.index("track_starting"), SimulationSettings("deepcore"))
        events |= {"energy": np.full(1_000, energy), "inelasticity": np.full(1_000, 1e-4)}
        per_metre.append(light.event_light(rng, detector, events)[0][3].sum() / energy)
    assert abs(per_metre[0] / per_metre[1] - 1) < 0.25


def test_bundles_share_their_energy(rng, detector):
    "The losses of the muons of a bundle add up to no more than its energy."
    bundles = sample_neutrinos(rng, 200, BUNDLE, SimulationSettings(bundles=0.3))
    radiated, tracks, (event, _, direction, _, energy) = light._muon_light(rng, detector, bundles)
    secondaries = light.SECONDARIES * neutrinos.MAX_LENGTH * bundles["n_muons"]
    assert len(radiated) == 200
    assert (radiated + np.bincount(event, energy, 200) <= bundles["energy"] * (1 + 1e-9) + secondaries).all()
    assert np.allclose(direction, bundles["lepton"][event])
    assert len(np.unique(tracks[0])) > 20


# Read-out

def test_noise_and_charges(rng, detector):
    "Noise has its rate, single photo-electrons their mean charge."
    charge = readout.spe_charge(rng, np.ones(100_000))
    assert (charge > 0).all()
    assert 0.8 < charge.mean() < 1
    event, _, _ = readout.noise_hits(rng, detector, np.zeros(40), np.full(40, 1e5))
    rate = len(event) / (40 * 1e5 * len(detector.alive)) * 1e9
    assert abs(rate / (470 * 1.22) - 1) < 0.02


def test_late_pulses_and_after_pulses(rng):
    "Shares of late pulses and of after-pulses, as many near each delay as the three bells have there."
    n = 200_000
    later, parent, delay = readout.delayed_pulses(rng, np.zeros(n), np.ones(n))
    assert abs((later > 0).mean() / LATE_SHARE - 1) < 0.05
    assert abs(len(parent) / n / sum(share for share, _, _ in AFTER_PULSES) - 1) < 0.05
    def below(x, middle, spread): return 0.5 * (1 + math.erf((x - middle) / spread / 2 ** 0.5))
    for _, middle, _ in AFTER_PULSES:
        low, high = middle - 500, middle + 500
        expected = sum(share * (below(high, m, s) - below(low, m, s)) for share, m, s in AFTER_PULSES)
        assert abs((np.abs(delay - middle) < 500).sum() / n / expected - 1) < 0.1


def test_windows_against_a_loop(rng):
    "The fast form opens the windows that a loop over the hits opens."
    channel = np.sort(rng.integers(0, 5, 400))
    time = rng.uniform(0, 300, 400)
    time = time[np.lexsort((time, channel))]
    opened, expected = {}, []
    for i, (c, t) in enumerate(zip(channel, time, strict=True)):
        if c in opened and t < opened[c] + 5: continue
        opened[c] = t
        expected.append(i)
    key = channel * SPAN + time
    assert readout.window_starts(key, 5.0).tolist() == expected
    assert len(readout.window_starts(key[:0], 5.0)) == 0


def test_saturation():
    "10 % less at 31 p.e. per nanosecond, nothing for one photo-electron, 64 p.e. per nanosecond at most."
    fine, coarse = readout.MERGE, readout.COARSE
    assert np.isclose(readout.saturated(31.0 * fine, fine), 0.9 * 31 * fine, rtol=0.002)
    assert np.isclose(readout.saturated(1.0, fine), 1, rtol=1e-4)
    assert readout.saturated(1e6, coarse) < 64 * coarse


def test_read_out_of_a_string(detector):
    "Eight DOMs trigger, seven or faint hits do not; close hits merge; an isolated DOM gives one stamp."
    sensor = np.array([0, 1, 2, 3, 4, 5, 6, 7, 30, 30, 2, 2])
    time = np.array([0.0, 100, 200, 300, 400, 500, 600, 700, 350, 380, 203, 240]) + 20_000
    hits = np.zeros(12, int), sensor, time, np.ones(12)
    (_, s, t, q, auxiliary), triggered = read_out(*hits, 1, detector.neighbours)
    assert triggered[0]
    assert t[0] == TRIGGER_TIME
    assert (np.diff(t) >= 0).all()
    assert auxiliary[s == 30].tolist() == [True]
    assert q[s == 30].tolist() == [2.0]
    assert t[s == 2].tolist() == [10_202, 10_240]
    assert q[s == 2].tolist() == [2.0, 1.0]
    seven = [x[sensor != 7] for x in hits]
    assert not read_out(*seven, 1, detector.neighbours)[1].any()
    pulses, triggered = read_out(*hits[:3], np.full(12, 0.1), 1, detector.neighbours)
    assert not triggered.any()
    assert all(len(x) == 0 for x in pulses)


def string_hits(string, times): # string from 1; hits on its DOMs 50, 51, ...
    dom = 60 * (string - 1) + 49 + np.arange(len(times))
    return np.zeros(len(times), int), dom, 20_000.0 + np.array(times), np.ones(len(times))


@pytest.mark.parametrize("string, times, kept", [
    (86, (0, 500, 1_400), True), (36, (0, 900, 1_800), True),
    (86, (0, 500), False),                      # two launches
    (86, (0, 800, 1_600, 2_501), True), (86, (0, 900, 3_000, 3_900), False),  # two and two
    (1, (0, 500, 1_400), False)])               # not in DeepCore
def test_deepcore_trigger(detector, string, times, kept):
    "Three HLC launches in 2.5 microseconds in DeepCore, which SMT8 ignores."
    hits = string_hits(string, times)
    settings = SimulationSettings("deepcore")
    assert read_out(*hits, 1, detector.neighbours, settings)[1].tolist() == [kept]
    assert not read_out(*hits, 1, detector.neighbours)[1].any()


def test_deepcore_fiducial_doms():
    "The published list: DOMs 11 to 60 of strings 79 to 86, 39 to 60 of the twelve around them."
    counts = readout.deepcore_fiducial()
    assert counts.sum() == 8 * 50 + 12 * 22
    for string, dom, fiducial in ((79, 10, False), (79, 11, True), (86, 60, True), (36, 38, False),
                                  (36, 39, True), (25, 60, True), (24, 60, False)):
        assert counts[60 * (string - 1) + dom - 1] == fiducial, (string, dom)
    xyz = load_geometry().xyz
    centre = xyz[60 * 35, :2]
    assert np.linalg.norm(xyz[counts, :2] - centre, axis=1).max() < 260
    assert xyz[counts, 2].max() < -120


# Events

def test_low_energy_events():
    "Energies and vertices are those of the mix; three HLC pulses in DeepCore in 2.5 microseconds."
    pulses, truth = simulate_events(200, seed=2, mix="deepcore")
    x, y, radius, bottom, top = neutrinos.MIXES["deepcore"]["vertices"]
    assert set(truth.type) == {"track_starting", "cascade"}
    assert truth.energy.between(5, 200).all()
    assert (np.hypot(truth.vertex_x - x, truth.vertex_y - y) <= radius).all()
    assert truth.vertex_z.between(bottom, top).all()
    assert pulses.event_id.nunique() == 200
    for event_id, event in pulses.groupby("event_id"):
        hlc = event[~event.auxiliary & readout.deepcore_fiducial()[event.sensor_id]]
        first = hlc.groupby("sensor_id").time.min().sort_values().to_numpy()
        gap = first[2:] - first[:-2] if len(first) > 2 else np.array([])
        again = hlc[hlc.sensor_id.duplicated()]  # a DOM that launches twice counts twice
        assert len(again) or gap.min() <= readout.DEEPCORE_WINDOW + readout.COARSE, event_id
        assert (hlc.time == TRIGGER_TIME).any(), event_id


def test_brighter_neutrinos_trigger_more_often(rng, detector):
    "The share that DeepCore's trigger keeps rises with energy, to nearly one inside."
    settings = SimulationSettings("deepcore")
    shares = []
    for energy in (5.0, 20.0, 200.0):
        events = sample_neutrinos(rng, 600, KINDS.index("cascade"), settings)
        events |= {"energy": np.full(600, energy), "is_nc": np.zeros(600, bool)}
        events["vertex"][:, 2] = rng.uniform(-450, -250, 600)
        photons, _ = light.event_light(rng, detector, events)
        shares.append(dataset.detect(rng, detector, photons, 600, settings)[1].mean())
    assert shares[0] < 0.35 < 0.8 < shares[2]
    assert shares[0] < shares[1] < shares[2]


@pytest.fixture(scope="module")
def events():
    return simulate_events(300, seed=1)


def test_events_have_the_form_of_the_kaggle_layout(events):
    "Events and times in order, charges in steps; a seed gives the same events whatever their number."
    pulses, truth = events
    assert pulses.event_id.nunique() == len(truth) == 300
    assert pulses.event_id.is_monotonic_increasing
    assert (pulses.groupby("event_id").time.diff().dropna() >= 0).all()
    assert pulses.time.dtype == np.int64
    assert (pulses.charge > 0).all()
    steps = pulses.charge / readout.CHARGE_STEP
    assert np.allclose(steps, np.rint(steps), atol=1e-4)
    again, _ = simulate_events(100, seed=1)
    pd.testing.assert_frame_equal(again, pulses[pulses.event_id < 100])
    assert not simulate_events(100, seed=2)[0].equals(again)


def test_all_kinds():
    "Shares after the trigger are those of the settings."
    pulses, truth = simulate_events(
        200, seed=1, double_cascades=0.25, bundles=0.25, directions="atmospheric", saturation=True)
    shares = truth.type.value_counts(normalize=True)
    assert set(shares.index) == set(KINDS)
    assert all(abs(shares[kind] - 0.25) < 0.12 for kind in KINDS[3:])
    assert pulses.charge.max() <= 64 * readout.STAMP
    _, truth = simulate_events(200, seed=1, mix="cascades")
    assert abs((truth.type == "cascade").mean() - 0.7) < 0.12


def test_trigger_on_finished_pulses(events):
    "HLC pulses of eight DOMs within 5 microseconds; the first launch stands at the trigger time."
    pulses, _ = events
    for event_id, event in pulses.groupby("event_id"):
        hlc = event[~event.auxiliary].sort_values("time")
        time, sensor = hlc.time.to_numpy(), hlc.sensor_id.to_numpy()
        end = np.searchsorted(time, time + 5000, "right")
        assert any(len(np.unique(sensor[i:j])) >= 8 for i, j in enumerate(end)), event_id
        assert (time == TRIGGER_TIME).any()
    # the pulse at TRIGGER_TIME stands at the mean of the hits that it took up
    assert pulses.time.min() >= TRIGGER_TIME - readout.BEFORE - readout.MERGE


def test_coincidence_on_finished_pulses(events):
    "HLC pulses have a neighbour within a microsecond; auxiliary ones have no auxiliary neighbour."
    pulses, _ = events
    for event_id, event in list(pulses.groupby("event_id"))[:40]:
        sensor, time = event.sensor_id.to_numpy().astype(int), event.time.to_numpy()
        auxiliary = event.auxiliary.to_numpy()
        def neighbours_of(s, sensor=sensor):
            return (np.abs(sensor - s) <= 2) & (sensor != s) & (sensor // 60 == s // 60)
        for s in np.unique(sensor[~auxiliary]):
            mine = time[(sensor == s) & ~auxiliary]
            complete = time.min() + 1_000 <= mine.min() <= time.max() - 1_000
            if not complete: continue  # the pulses of its neighbour may lie outside the read-out
            near = time[neighbours_of(s)]
            assert len(near), (event_id, s)
            assert np.abs(mine[:, None] - near).min() <= 1011, (event_id, s)
        for i in np.flatnonzero(auxiliary):
            near = time[neighbours_of(sensor[i]) & auxiliary]
            assert not len(near) or np.abs(near - time[i]).min() >= 999, event_id


def test_bright_events(monkeypatch):
    "Over 100,000 pulses on over 2,000 DOMs; an error where there is none."
    pulses, truth = simulate_events(1, seed=0, bright=True)
    assert len(pulses) > 100_000
    assert pulses.sensor_id.nunique() > 2_000
    assert truth.energy[0] > 1e8
    monkeypatch.setattr(dataset, "_triggered_events", lambda *_: ([np.zeros(9)] * 5, None))  # never bright
    detector, settings = make_detector(dead_doms=2_500), SimulationSettings(bright=True)
    with pytest.raises(ValueError, match="more than 2,660 DOMs"):
        dataset._bright_event(np.random.default_rng(0), detector, settings)


def test_another_law_of_light_is_patched_in(monkeypatch):
    "`cascade_light` is looked up when it is used: replacing it changes the light of cascades only."
    def dark(rng, detector, position, u, time, energy):
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0)
    monkeypatch.setattr(light, "cascade_light", dark)
    events = sample_neutrinos(np.random.default_rng(0), 20, KINDS.index("cascade"), SimulationSettings())
    photons, deposited = light.event_light(np.random.default_rng(0), make_detector(), events)
    assert len(photons[0]) == 0
    assert (deposited > 0).all()


# Data sets

@pytest.fixture
def folder(tmp_path):
    return simulate_dataset(tmp_path / "data", 250, seed=5, workers=1, progress=False)


def test_data_set_does_not_depend_on_the_number_of_processes(folder, tmp_path):
    "The same files, byte for byte in their tables, from one process and from two."
    other = simulate_dataset(tmp_path / "other", 250, seed=5, workers=2, progress=False)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    batches = [f"train/batch_{k}.parquet" for k in range(1, 6)]
    assert names == [*batches, "train_meta.parquet", "truth.parquet"]
    for name in names:
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name), pd.read_parquet(other / name))
    assert (folder / "sensor_geometry.csv").read_text() == (other / "sensor_geometry.csv").read_text()


def test_data_set_reads_as_one(folder):
    "Rows of the meta table, pulses and targets agree."
    batch = pd.read_parquet(folder / "train/batch_1.parquet")
    meta = pd.read_parquet(folder / "train_meta.parquet")
    row = meta.iloc[3]
    first, last = int(row.first_pulse_index), int(row.last_pulse_index)
    assert (batch.index[first:last + 1] == row.event_id).all()
    assert (batch.index == row.event_id).sum() == last - first + 1
    events, count = IceCubeDataset(folder), meta.last_pulse_index - meta.first_pulse_index + 1
    assert len(events) == 250
    assert {int(events[i]["n_pulses"]) for i in range(3)} == set(count[:3])
    assert np.allclose(events[7]["target"], meta[["azimuth", "zenith"]].iloc[7], atol=1e-6)


def test_complete_data_set_is_reused(folder):
    "A second call writes nothing; other settings are refused by name."
    stamp = (folder / "truth.parquet").stat().st_mtime_ns
    assert simulate_dataset(folder, 250, seed=5, progress=False) == folder
    assert (folder / "truth.parquet").stat().st_mtime_ns == stamp
    dim = Geometry(load_geometry().xyz, 0.9 * default_efficiency())
    with pytest.raises(FileExistsError, match=r"\(seed\)"): simulate_dataset(folder, 250, seed=6)
    path = folder / "simulation.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "unknown_ice"}))
    simulate_dataset(folder, 250, seed=5)                      # made before there was this setting
    with pytest.raises(FileExistsError, match="unknown_ice"):
        simulate_dataset(folder, 250, seed=5, unknown_ice=True)
    with pytest.raises(FileExistsError, match=r"\(geometry\)"):
        simulate_dataset(folder, 250, seed=5, geometry=dim)


def test_interrupted_data_set_is_made_again(folder, tmp_path):
    "Parts that killed processes left behind are removed."
    (folder / "train_meta.parquet").unlink()
    for name in (".simulation.json.part1", ".train_meta.parquet.part1", "train/.batch_2.parquet.part1"):
        (folder / name).touch()
    simulate_dataset(folder, 250, seed=5, workers=1, progress=False)
    assert (folder / "train_meta.parquet").is_file()
    assert not list(folder.rglob(".*"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.simulation.json.part1").touch()
    assert not list(simulate_dataset(tmp_path / "new", 20, progress=False).rglob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, end):
    "However that ends; otherwise each would keep its memory for ever."
    [parent] = launch(tmp_path / "output", simulate_dataset, tmp_path / "data", 50_000, workers=2,
                      progress=False, daemon=False)
    deadline = time.monotonic() + 60
    while len(workers := children(parent.pid)) < 2 and time.monotonic() < deadline: time.sleep(0.05)
    os.kill(parent.pid, end)
    parent.join()
    while any(map(is_running, workers)) and time.monotonic() < deadline: time.sleep(0.05)
    assert len(workers) == 2 and not any(map(is_running, workers))


def children(process) -> list: # ids of processes
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def is_running(process) -> bool: # a zombie has ended
    try: state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError: return False
    return state != "Z"


@pytest.mark.parametrize("text, word", [("{'seed': 5}", "simulation.json is damaged"),
                                        ("[5]", "no simulated data set")])
def test_damaged_settings_are_refused(folder, text, word):
    "A folder that cannot be recognised is left alone."
    (folder / "simulation.json").write_text(text)
    with pytest.raises(FileExistsError, match=word): simulate_dataset(folder, 250, seed=5)


def test_file_in_place_of_a_folder(tmp_path):
    "A file is not overwritten."
    (tmp_path / "data").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"): simulate_dataset(tmp_path / "data", 20)


def test_dead_doms_of_the_geometry_count(tmp_path):
    "DOMs that the geometry names are among the dead ones."
    efficiency = np.where(np.arange(N_SENSORS) % 60 == 7, 0, default_efficiency())
    geometry = Geometry(load_geometry().xyz, efficiency)
    dead = [N_SENSORS - len(make_detector(geometry, n).alive) for n in (0, 86, 100, [3, 7])]
    assert dead == [86, 86, 100, 87]
    out = simulate_dataset(tmp_path / "data", 5, geometry=geometry, dead_doms=100, progress=False)
    assert len(json.loads((out / "simulation.json").read_text())["dead_doms"]) == 100


@pytest.mark.parametrize("change, word", [
    ({"seed": -1}, "seed must be"),
    ({"dead_doms": 6000}, "dead_doms must be"),
    ({"dead_doms": [3, 5160]}, "dead_doms must be"),
    ({"n_events": 0}, "n_events must be"),
    ({"events_per_file": 200_001}, "events_per_file must be"),
    ({"bright": True, "dead_doms": 3160}, "but 2,000 record"),
])
def test_wrong_requests_make_nothing(tmp_path, change, word):
    "The name stays free for the corrected call."
    request = {"n_events": 100} | change
    with pytest.raises(ValueError, match=word): simulate_dataset(tmp_path / "none", **request)
    assert not (tmp_path / "none").exists()


def test_geometry_that_never_triggers(monkeypatch):
    "An error rather than a loop without end."
    def two_cascades(rng, n, kind, settings):
        return sample_neutrinos(rng, 2, KINDS.index("cascade"), settings)
    monkeypatch.setattr(dataset, "sample_neutrinos", two_cascades)
    geometry = Geometry(load_geometry().xyz * 1000)
    with pytest.raises(ValueError, match="almost no simulated event triggers"):
        simulate_events(5, geometry=geometry)


def test_demo_data_are_made_once(tmp_path, monkeypatch):
    "The second call gives the same folder; its detector is that of the pretrained models."
    monkeypatch.setattr(dataset.tempfile, "tempdir", str(tmp_path))
    demo = demo_dataset(20)
    assert demo == demo_dataset(20)
    assert demo.parent == tmp_path
    assert len(list((demo / "train").glob("batch_*.parquet"))) == 5
    assert list(tmp_path.iterdir()) == [demo]
    HierarchicalTransformer.from_pretrained("small").check_geometry(load_geometry(demo), 0.01)


def test_package_imports_lazily():
    "`import iceaggr.simulation` is cheap; its names are there."
    code = ("import sys, iceaggr.simulation as s; assert 'numpy' not in sys.modules; "
            "from iceaggr.simulation import SimulationSettings, simulate_dataset, simulate_events; "
            "assert {'simulate_events', 'demo_dataset'} <= set(dir(s))")
    subprocess.run([sys.executable, "-c", code], check=True)
