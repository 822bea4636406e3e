"""One process of several: which events it has, and what passes between processes."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from iceaggr.engine import distributed


@pytest.fixture
def group_of_one():
    "A process group with a single member."
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 5, 100])
def test_balanced_shares(world):
    "Each event once, in order, and no process with more than Graham's bound for any order."
    n = np.random.default_rng(0).pareto(1.0, 64).astype(int) + 12
    shares = [distributed.balanced_share(n, r, world) for r in range(world)]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(n)))
    assert all((np.diff(share) > 0).all() for share in shares)
    load = max(n[share].sum() for share in shares)
    assert load <= n.sum() / world + (1 - 1 / world) * n.max()


@pytest.mark.parametrize("world", [1, 3, 1000])
def test_contiguous_shares(world):
    "Each batch once, in order, and about equally many pulses each."
    sizes = np.random.default_rng(1).integers(20_000, 33_000, 40)
    parts = [distributed.contiguous_share(sizes, r, world) for r in range(world)]
    assert np.array_equal(np.concatenate(parts), np.arange(len(sizes)))
    if world <= len(sizes): assert max(sizes[p].sum() for p in parts) <= sizes.sum() / world + sizes.max()
    assert len(distributed.contiguous_share([], 0, world)) == 0


def test_one_process_talks_to_itself():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.sum_over(3, True) == [3.0, 1.0] and distributed.same_for_all(3)
    with distributed.process_group("cpu") as device:
        assert device == "cpu" and not distributed.joined()


def test_gradients_of_a_group_of_one(group_of_one):
    "A parameter that nobody used keeps no gradient."
    layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    layers[0](torch.ones(3)).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in layers.parameters()]
    assert float(distributed.sum_gradients(layers.parameters(), torch.tensor(7.0))) == 7
    for p, gradient in zip(layers.parameters(), before, strict=True):
        assert p.grad is None if gradient is None else torch.equal(p.grad, gradient)


def test_tables_of_a_group_of_one(group_of_one):
    "64-bit ids and NaN arrive as they were, and empty tables stay empty."
    table = pd.DataFrame({"event_id": np.array([2**62 + 1, -5]), "kappa": np.array([np.nan, 1e-300])})
    pd.testing.assert_frame_equal(distributed.gather_table(table), table)
    empty = table[:0].reset_index(drop=True)
    pd.testing.assert_frame_equal(distributed.gather_table(table[:0]), empty)


def test_errors_of_a_group_of_one(group_of_one):
    def fail(): raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): distributed.on_first(fail)
    with pytest.raises(distributed.OtherProcessFailed, match="process 0"):
        distributed.together(lambda: torch.zeros(2) @ torch.zeros(3))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._local_device(2) == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--nproc-per-node 2"): distributed._local_device(2)
