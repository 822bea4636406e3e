"""The line fit: fallbacks, independence of events, a least-squares solver, a published figure."""
import numpy as np
import pytest

from iceaggr.geometry import Geometry
from iceaggr.line_fit import line_fit

STRING = np.stack([np.zeros(60), np.zeros(60), 500 - 17.0 * np.arange(60)], -1)
FALL = np.stack([10_000 + 17 / 0.3 * np.arange(60), np.ones(60), np.arange(60), np.zeros(60)], -1)


def random_pulses(n, sensors, seed, share_auxiliary):
    "Pulses without any order."
    rng = np.random.default_rng(seed)
    columns = [rng.uniform(9e3, 1.5e4, n), rng.exponential(1, n), rng.integers(0, sensors, n)]
    return np.stack([*columns, rng.random(n) < share_auxiliary], -1)


def test_fallbacks():
    "Auxiliary pulses are used only where the others fix no direction; without any, straight up."
    assert np.allclose(line_fit(FALL, STRING), [[0, 0, 1]])
    noise = np.array([[10_000.0, 50, 59, 1], [13_000, 50, 0, 1]])
    one_time = np.array([[10_000.0, 1, 3, 0], [10_000, 1, 9, 0], [11_000, 1, 3, 1]])
    one_dom = np.array([[10_000.0, 1, 3, 0], [10_500, 1, 3, 0]])
    pulses = np.concatenate([FALL, noise, one_time, one_dom])
    fits = line_fit(pulses, STRING, np.repeat([0, 1, 2], [62, 3, 2]), 4)          # event 3 has no pulse
    assert np.allclose(fits, [[0, 0, 1], [0, 0, -1], [0, 0, 1], [0, 0, 1]])


def test_least_squares_solver():
    "Each event agrees with numpy's solver."
    xyz = np.random.default_rng(0).normal(0, 300, (100, 3))
    pulses = random_pulses(200, 100, 0, 0.3)
    event = np.sort(np.random.default_rng(1).integers(0, 5, 200))
    for k, fit in enumerate(line_fit(pulses, xyz, event)):
        t, q, sensor, _ = pulses[(event == k) & (pulses[:, 3] == 0)].T
        weight = np.sqrt(q)[:, None]
        design = np.stack([np.ones_like(t), t - 1e4], -1) * weight
        v = np.linalg.lstsq(design, xyz[sensor.astype(int)] * weight, rcond=None)[0][1]
        assert np.allclose(fit, -v / np.linalg.norm(v))


def test_other_events_play_no_part():
    "Together or one by one, in any order of the pulses, the fits are the same unit vectors."
    xyz = np.random.default_rng(1).normal(0, 300, (50, 3))
    pulses = random_pulses(90, 50, 1, 0.4).astype(np.float32)
    event = np.repeat([0, 1, 2], 30)
    together = line_fit(pulses, xyz, event, 3)
    for k in range(3): assert np.allclose(line_fit(pulses[event == k], xyz)[0], together[k], atol=1e-12)
    order = np.random.default_rng(2).permutation(90)
    assert np.allclose(line_fit(pulses[order], xyz, event[order], 3), together, atol=1e-9)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)


@pytest.mark.parametrize("pulses", [np.zeros((0, 4)), [[1e4, 0.0, 3, 0], [1.1e4, 0, 4, 0]], [[1e4, 1, 3, 0]]])
def test_pulses_that_fix_no_direction(pulses):
    "No pulse, no charge, one pulse: straight up."
    assert np.allclose(line_fit(np.array(pulses), STRING), [[0, 0, 1]])


def test_full_physics_events(ppc_root):
    "The figures of the data's own description."
    from iceaggr.data import IceCubeDataset
    from iceaggr.evaluation import evaluate, event_truth
    from iceaggr.line_fit import line_fit_events
    dataset = IceCubeDataset(ppc_root, batch_ids=[4])
    metrics = evaluate(line_fit_events(dataset), event_truth(dataset, ppc_root))
    median = {row["name"]: row["model"]["median"] for row in metrics["by"]["type"]}
    assert abs(metrics["model"]["mean_degrees"] - 35.2) < 0.1
    assert abs(median["track_through"] - 4.6) < 0.1
    assert abs(median["track_starting"] - 11.8) < 0.1
    assert abs(median["cascade"] - 83.1) < 0.1


def test_a_geometry_is_refused():
    "The fit takes positions; the message names where they are."
    with pytest.raises(TypeError, match="its .xyz"): line_fit(np.ones((3, 4)), Geometry.nominal())
