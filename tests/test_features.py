"""Fourier features, encoders, local coincidences and the vertex fit."""
import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from iceaggr.features import (
    NEAREST,
    SLOWED,
    DOMEncoder,
    FourierFeatures,
    PulseEncoder,
    _vertex_features,
    coincident_doms,
    event_centre,
    sensor_table,
    vertex_estimate,
)
from iceaggr.geometry import DOMS_PER_STRING, SPEED_OF_LIGHT, Geometry


def test_fourier_features():
    "Amplitudes are those of the buffer, the mean square is a half, half precision keeps the frequencies."
    fourier, t = FourierFeatures(16, 50., 50_000.), torch.tensor([-4_000., 0., 5_999.])
    assert fourier(t).shape == (3, fourier.n_out)
    squares = fourier(torch.tensor(1234.)).view(2, 16).square().sum(0)
    torch.testing.assert_close(squares, fourier.amplitude.square())                   # sin^2 + cos^2
    torch.testing.assert_close(fourier(t).square().mean(), torch.tensor(0.5))
    half = PulseEncoder(64).to(torch.bfloat16)
    assert half.time.frequency.dtype == torch.float64 and half.proj.weight.dtype == torch.bfloat16


def test_pulse_encoder_at_the_extremes():
    "Well scaled for the latest and brightest pulse; blind to the sensor and to the zero of the clock."
    torch.manual_seed(0)
    encoder = PulseEncoder(64)
    pulses = torch.tensor([[10_000., 1., 17., 0.], [10_000., 1., 4_000., 0.], [77_785., 2_762., 17., 1.]])
    x = encoder(pulses, torch.full((3,), 9_900.), torch.full((3,), 10_000.))
    assert x.isfinite().all() and x.abs().max() < 10
    assert torch.equal(x[0], x[1])
    later = pulses + torch.tensor([5_000., 0, 0, 0])
    assert torch.equal(x, encoder(later, torch.full((3,), 14_900.), torch.full((3,), 15_000.)))


def test_centre_without_doms():
    positions, charge = torch.tensor([[0., 0, 0], [10, 0, 0], [5, 5, 5]]), torch.tensor([1., 3., 999.])
    centre = event_centre(positions, charge, torch.tensor([0, 0, 1]), 3)
    assert centre.tolist() == [[7.5, 0, 0], [5, 5, 5], [0, 0, 0]]


def test_coincidences_against_every_pair():
    rng = np.random.default_rng(1)
    ids = [rng.choice(3 * DOMS_PER_STRING, 60, replace=False) for _ in range(2)]
    ids, time = torch.tensor(np.concatenate(ids)), torch.tensor(rng.integers(0, 4, 120) * 1_000.)
    event = torch.repeat_interleave(torch.arange(2), 60)
    found = coincident_doms(ids, time, event)

    def near(i, j):
        return (i != j and event[i] == event[j] and ids[i] // 60 == ids[j] // 60
                and abs(ids[i] - ids[j]) <= 2 and abs(time[i] - time[j]) <= 1_000)
    assert found.tolist() == [any(near(i, j) for j in range(120)) for i in range(120)]
    assert 20 < found.sum() < 100


def test_neighbours_by_number_are_no_coincidence():
    sensors, event = torch.tensor([59, 60, 5_159, 0]), torch.tensor([0, 0, 0, 1])
    assert not coincident_doms(sensors, torch.zeros(4), event).any()


XYZ = torch.tensor(Geometry.nominal().xyz, dtype=torch.float32)
POINTS = torch.tensor([[-80., 120., 210.], [200., -30., -330.], [10., 15., 20.]])
TIMES = torch.tensor([9_900., 10_300., 9_000., 500.])


def cascade(rng, point, n_noise):
    "DOMs within 180 m of a point, their light as the fit assumes it, and noise anywhere at any time."
    distance = ((XYZ - point).square().sum(1) + NEAREST ** 2).sqrt()
    near = torch.nonzero(distance < 180)[:, 0]
    noise = torch.tensor(rng.choice(len(XYZ), n_noise, replace=False))
    time, charge = 10_000 + SLOWED * distance[near] / SPEED_OF_LIGHT, 1e5 / distance[near] ** 2
    light = torch.stack([time, charge, torch.ones(len(near))], 1)
    dark = np.stack([rng.uniform(7_000, 14_000, n_noise), np.ones(n_noise), np.ones(n_noise)], 1)
    return torch.cat([XYZ[near], XYZ[noise]]), torch.cat([light, torch.tensor(dark, dtype=torch.float32)])


@pytest.fixture(scope="module")
def cascades():
    "Three cascades with 0, 20 and 40 noise hits, and an event of one DOM: places, features, event."
    rng = np.random.default_rng(0)
    events = [cascade(rng, point, n) for point, n in zip(POINTS, (0, 20, 40), strict=True)]
    events.append((XYZ[:1], torch.tensor([[500., 0.25, 1.]])))
    places, features = (torch.cat([e[k] for e in events]) for k in (0, 1))
    n_doms = torch.tensor([len(e[0]) for e in events])
    return places, features, torch.repeat_interleave(torch.arange(4), n_doms)


def test_vertex_of_cascades(cascades):
    found = vertex_estimate(*cascades, TIMES)
    error = (found[:3, :3] - POINTS).norm(dim=1)
    assert error[0] < 0.5 and error.max() < 5
    assert (found[:3, 3] - 10_000).abs().max() < 20
    assert found.isfinite().all() and (found[3, :3] - XYZ[0]).norm() < 0.1            # one DOM: its own place


def test_vertex_of_other_events_and_origins(cascades):
    "The order of DOMs, the other events, and the origin of place and time do not matter."
    places, features, event = cascades
    found = vertex_estimate(*cascades, TIMES)
    order = torch.tensor(np.random.default_rng(0).permutation(len(event)))
    shuffled = vertex_estimate(places[order], features[order], event[order], TIMES)
    torch.testing.assert_close(shuffled, found, atol=0.05, rtol=0)
    own = event == 1
    single = vertex_estimate(places[own], features[own], torch.zeros_like(event[own]), TIMES[1:2])
    torch.testing.assert_close(single[0], found[1], atol=0.05, rtol=0)
    away, later = torch.tensor([300., 0, -50]), torch.tensor([2_000., 0, 0])
    moved = vertex_estimate(places + away, features + later, event, TIMES + 2_000)
    torch.testing.assert_close(moved, found + torch.tensor([300., 0, -50, 2_000]), atol=0.05, rtol=0)


def test_isolated_doms_count_less(cascades):
    places, features, event = cascades
    every = torch.ones(len(event), dtype=torch.bool)
    assert torch.equal(vertex_estimate(*cascades, TIMES, every), vertex_estimate(*cascades, TIMES))
    loud = features.clone()
    loud[-2, 1] = 10.                                          # a noise hit, louder than the light
    isolated = every.clone()
    isolated[-2] = False
    found = [vertex_estimate(places, loud, event, TIMES, c)[2, :3] for c in (None, isolated)]
    off = [float((x - POINTS[2]).norm()) for x in found]
    assert off[1] < off[0]


def test_vertex_is_the_minimum_that_another_method_finds(cascades):
    "The same sum of Cauchy terms, minimised by scipy."
    places, features, event = cascades
    own = (event == 2).numpy()
    p, time = places.numpy()[own].astype(float), features.numpy()[own, 0].astype(float)
    ct = SPEED_OF_LIGHT * (time - 9_000)
    q = features.numpy()[own, 1].astype(float).clip(0.1, 10)
    start = ((q ** 3)[:, None] * np.c_[p, ct.clip(-1500, 1500)]).sum(0) / (q ** 3).sum()

    def terms(x):
        late = ct - x[3] - SLOWED * np.sqrt(((p - x[:3]) ** 2).sum(1) + NEAREST ** 2)
        return np.r_[q * 50 * np.sqrt(np.log1p((late / 50) ** 2)), 50 / 80 * (x - start)]
    best = least_squares(terms, np.r_[POINTS[2].numpy(), SPEED_OF_LIGHT * 1_000]).x
    found = vertex_estimate(*cascades, TIMES)[2]
    found[3] = SPEED_OF_LIGHT * (found[3] - 9_000)
    assert np.abs(best - found.numpy()).max() < 1


def test_dom_encoder():
    "Finite and well scaled; blind to the zero of the clock; the view from the vertex is what it says."
    torch.manual_seed(0)
    sensors, encoder = sensor_table(Geometry.nominal())[[0, 5_159]], DOMEncoder(64)
    features = torch.tensor([[10_000., 1., 1.], [10_020., 2_762., 466.]])
    centre = torch.tensor([[100., 0., -200.]]).expand(2, -1)
    vertex = torch.tensor([[90., 10., -210., 9_900.]]).expand(2, -1)
    y = encoder(sensors, features, torch.full((2,), 9_950.), centre, vertex)
    assert y.shape == (2, 64) and y.isfinite().all() and y.abs().max() < 10
    later = encoder(sensors, features + torch.tensor([100., 0, 0]), torch.full((2,), 10_050.), centre,
                    vertex + torch.tensor([0., 0, 0, 100]))
    assert torch.equal(later, y)
    assert not torch.equal(encoder(sensors), y)                # without features: position and ice only
    seen = _vertex_features(encoder, vertex, sensors, features)[:, -15:].double()
    difference = sensors[:, :3].double() - vertex[:, :3]
    distance = (difference.square().sum(1, keepdim=True) + NEAREST ** 2).sqrt()
    torch.testing.assert_close(seen[:, 3:6], difference / distance, atol=1e-6, rtol=0)
    late = SPEED_OF_LIGHT * torch.tensor([[100.], [120.]]) - SLOWED * distance
    torch.testing.assert_close(seen[:, :1].sinh() * 15, late, atol=0.01, rtol=0)
