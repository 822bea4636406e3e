"""Augmentation: motions of the detector, hashed random numbers, perturbed pulses."""
import os

import numpy as np
import pytest
import torch
from conftest import write_tiny

from iceaggr import augmentation
from iceaggr.augmentation import (
    _hashed_normal,
    _hashed_uniform,
    grid_axis,
    grid_motions,
    moved_detector,
    perturb,
)
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector
from iceaggr.dom_transformer import pulses_by_dom
from iceaggr.engine.loading import packed_batch
from iceaggr.geometry import Geometry
from iceaggr.io.kaggle import find_batches
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import demo_dataset


@pytest.fixture(scope="module")
def ds():
    root = os.environ.get("ICEAGGR_PPC") or demo_dataset()
    return IceCubeDataset(root, batch_ids=find_batches(root, "train")[:1], max_events=400)


def test_motions_of_icecube_are_a_group(ds):
    for geometry in (Geometry.nominal(), ds.geometry):
        motions, _ = grid_motions(geometry)
        assert motions.shape == (12, 2, 2) and np.allclose(motions[0], np.eye(2))
        assert np.allclose(motions @ motions.transpose(0, 2, 1), np.eye(2))
        assert sorted(np.linalg.det(motions).round(9)) == [-1] * 6 + [1] * 6
        for a in motions:
            for b in motions: assert np.abs(motions - a @ b).max((1, 2)).min() < 1e-6


def test_a_detector_without_a_grid_has_the_identity():
    xy = np.random.default_rng(0).uniform(-500, 500, (86, 1, 2)).repeat(60, 1).reshape(-1, 2)
    depth = Geometry.nominal().xyz[:, 2]
    assert len(grid_motions(Geometry(np.column_stack([xy, depth])))[0]) == 1


def test_axis_of_a_rotated_grid():
    steps = np.stack(np.meshgrid(range(5), range(4)), -1).reshape(-1, 2) @ [[1, 0], [0.5, 0.75 ** 0.5]]
    rotation = [[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]]
    spacing, axis = grid_axis(125 * steps @ rotation)
    assert np.isclose(spacing, 125) and np.isclose(axis, 0.3)


@torch.no_grad()
def test_moved_detector_is_a_detector_that_stands_there(ds):
    "The model gives what a model of the moved geometry gives; targets move along; all is restored."
    motions, point = grid_motions(ds.geometry)
    torch.manual_seed(0)
    model, batch = HierarchicalTransformer("small", ds.geometry), packed_batch(ds, range(24))
    plain, sensors = model.vector(batch), model.t2.sensors
    truth = angles_to_vector(*batch["metadata"]["targets"].T)
    for k, motion in enumerate(motions):
        with moved_detector(model.t2, batch, motion, point) as moved:
            found = model.vector(moved)
            target = angles_to_vector(*moved["metadata"]["targets"].T)
        xy = (ds.geometry.xyz[:, :2] - point) @ motion.T + point
        other = HierarchicalTransformer("small", Geometry(np.column_stack([xy, ds.geometry.xyz[:, 2]])))
        other.load_state_dict({**model.state_dict(), "t2.sensors": other.t2.sensors})
        assert torch.allclose(other.vector(batch), found, atol=1e-4)
        full = np.eye(3)
        full[:2, :2] = motion
        assert torch.allclose(target, truth @ torch.tensor(full.T, dtype=torch.float32), atol=1e-5)
        assert model.t2.sensors is sensors and (k == 0) == torch.allclose(found, plain, atol=1e-5)
    assert torch.equal(model.vector(batch), plain)


def test_hashed_uniform():
    x = _hashed_uniform(1, np.arange(200_000), 2)
    assert x.min() > 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.002 and abs(x.std() - 12 ** -0.5) < 0.001
    assert np.abs(np.histogram(x, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.01
    assert np.array_equal(x[7], _hashed_uniform(1, 7, 2))
    assert not np.intersect1d(x, _hashed_uniform(2, np.arange(200_000), 2)).size


def test_hashed_normal():
    n = _hashed_normal(3, np.arange(200_000))
    assert abs(n.mean()) < 0.01 and abs(n.std() - 1) < 0.01
    assert abs((np.abs(n) < 1.96).mean() - 0.95) < 0.003


def events_of(batch):
    "Pulses of each event, sorted by (sensor, time)."
    pulses, counts = pulses_by_dom(batch)
    event = torch.repeat_interleave(batch["metadata"]["dom_to_event_idx"], counts)
    return {int(i): pulses[event == n] for n, i in enumerate(batch["metadata"]["event_ids"])}


def test_perturbed_events_do_not_depend_on_their_company(ds):
    "They depend on seed and epoch."
    batch = packed_batch(ds, range(200))
    after = events_of(perturb(batch, 5, 1))
    for again in (perturb(batch, 5, 1), perturb(packed_batch(ds, range(50, 90), 128), 5, 1)):
        for i, pulses in events_of(again).items(): assert torch.equal(pulses, after[i])
    for seed, epoch in ((5, 2), (6, 1)):
        other = events_of(perturb(batch, seed, epoch))
        assert all(not torch.equal(pulses, after[i]) for i, pulses in other.items())


def test_perturbed_batch_is_one_of_perturbed_events(ds):
    "What the metadata say follows from the pulses that are left."
    batch = packed_batch(ds, range(200))
    before, perturbed = events_of(batch), perturb(batch, 5, 1)
    after, events = events_of(perturbed), []
    for i, pulses in after.items():
        in_time = pulses[torch.argsort(pulses[:, 0], stable=True)]
        events.append(dict(pulse_features=in_time, event_id=torch.tensor(i), n_pulses=len(pulses)))
        assert len(pulses) >= min(augmentation._MIN_PULSES, len(before[i]))
    built = collate_dom_packing(events)
    for key in ("dom_features", "sensor_ids", "dom_to_event_idx", "event_dom_counts", "event_times"):
        x, y = (b["metadata"][key] for b in (perturbed, built))
        assert torch.allclose(x.double(), y.double(), rtol=1e-5), key


def test_a_dom_of_several_sequences():
    "It is perturbed like any other, however long the sequences are."
    rng, n = np.random.default_rng(0), 2_000
    sensor = np.where(np.arange(n) % 2, 1_800, rng.integers(0, 5_160, n))
    columns = [np.sort(rng.uniform(0, 5_000, n)), rng.exponential(1, n), sensor, rng.random(n) < 0.2]
    pulses = torch.from_numpy(np.column_stack(columns).astype(np.float32))
    event = [dict(pulse_features=pulses, event_id=torch.tensor(77), n_pulses=torch.tensor(n))]
    short, long = (perturb(collate_dom_packing(event, max_seq_len=L), 5, 1) for L in (128, 2_048))
    assert torch.equal(events_of(short)[77], events_of(long)[77])
    assert short["packed_sequences"].shape[1] == 128
    pulses, m = events_of(long)[77], long["metadata"]
    brightest = int(m["dom_features"][:, 2].argmax())
    assert m["sensor_ids"][brightest] == 1_800
    assert m["dom_features"][brightest, 2] == (pulses[:, 2] == 1_800).sum() > 512


def test_shares_and_jitter(ds, monkeypatch):
    "The shares that stay and the sizes of the jitter are those wanted, over 400 events."
    batch = packed_batch(ds, range(len(ds)))
    before, after = (torch.cat(list(events_of(b).values())) for b in (batch, perturb(batch, 0, 0)))
    def kept(flag): return float((after[:, 3] == flag).sum() / (before[:, 3] == flag).sum())
    assert abs(kept(0) - (1 - augmentation._DOMS_OUT)) < 0.02
    assert abs(kept(1) - (1 - augmentation._DOMS_OUT) * (1 - augmentation._NOISE_OUT / 2)) < 0.03
    monkeypatch.setattr(augmentation, "_NOISE_OUT", 0.)
    monkeypatch.setattr(augmentation, "_DOMS_OUT", 0.)
    old, new = (torch.cat(list(events_of(b).values())) for b in (batch, perturb(batch, 0, 0)))
    gap = (old[1:, 0] - old[:-1, 0]).abs()
    isolated = gap[:-1].minimum(gap[1:]) > 50                 # the order of these pulses is the same
    shift = (new[:, 0] - old[:, 0])[1:-1][isolated]
    ratio = (new[:, 1] / old[:, 1]).log()[1:-1][isolated]
    assert abs(shift.std() / augmentation._TIME_JITTER - 1) < 0.1 and abs(shift.mean()) < 0.1
    assert abs(ratio.std() / augmentation._CHARGE_JITTER - 1) < 0.1


def test_tiny_events_stay_whole(tmp_path):
    "An event that would keep fewer than six pulses is left complete."
    tiny = IceCubeDataset(write_tiny(tmp_path / "tiny", {1: 20}))
    batch = packed_batch(tiny, range(20))
    before, after = events_of(batch), events_of(perturb(batch, 0, 0))
    assert all(len(after[i]) >= min(augmentation._MIN_PULSES, len(before[i])) for i in before)
