"""A training step of fixed shapes: no host reads, no graph breaks, the same result as without padding."""
import copy

import numpy as np
import pytest
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.engine.budget import Budget, choose_budgets, pad_batch, size_of
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.pooling import MeanPool
from iceaggr.training import MuonAdamW, TrainSettings, _batch_loss, train_step
from iceaggr.yardsticks import OperationCounter

SMALL = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)


@pytest.fixture
def events(tiny_dataset):
    return list(IceCubeDataset(tiny_dataset))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HierarchicalTransformer(SMALL)


def test_counter_finds_the_host_reads_of_a_plain_step(events, model):
    "The packed path on a batch of any shape reads lengths and checks on the host."
    model.t1.kernel = model.t2.kernel = "dense"
    batch, settings = collate_dom_packing(events), TrainSettings(batch_size=len(events))
    with OperationCounter() as counter: train_step(model, MuonAdamW(model, 1e-3), batch, settings, 1e-3)
    assert counter.operations["aten.nonzero.default"] == counter.host_reads["aten.nonzero.default"] == 1
    assert counter.host_reads["aten._local_scalar_dense.default"] > 4
    assert counter.host_reads["aten.bincount.default"] == 2


@pytest.fixture
def batch(events):
    return collate_dom_packing(events, 128)


def padded_by(batch, rows=2, doms=40, n_events=3):
    "The batch with so many more sequences, DOMs and events."
    size = size_of(batch)
    budget = Budget(size.rows + rows, size.layer_rows + 1, size.doms + doms, size.events + n_events)
    return pad_batch(batch, budget)


def loss_and_gradients(model, batch, kernel):
    "Summed loss and the gradients of all parameters."
    model.t1.kernel = model.t2.kernel = kernel
    loss = _batch_loss(model.vector(batch), batch)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("pool", [None, MeanPool])
def test_padding_changes_nothing(batch, pool):
    "Vectors, loss and gradients, against the path without padding, in float64."
    torch.manual_seed(0)
    model = HierarchicalTransformer(SMALL, pool=pool).double()
    padded = padded_by(batch)
    expected, found = model.vector(batch), model.vector(padded)
    assert torch.allclose(found[:len(expected)], expected, rtol=1e-9, atol=1e-9)
    loss, gradients = loss_and_gradients(model, batch, "grouped")
    padded_loss, padded_gradients = loss_and_gradients(model, padded, "dense")
    assert abs(loss - padded_loss) < 1e-8 * abs(loss)
    for a, b in zip(gradients, padded_gradients, strict=True):
        assert (a - b).norm() <= 1e-8 * a.norm() + 1e-12


def test_contents_of_the_padding_do_not_matter(batch, model):
    "Other pulses, features and sensors there: the same vectors and gradients bit for bit."
    padded = padded_by(batch)
    other = copy.deepcopy(padded)
    m, doms, cells = other["metadata"], ~other["metadata"]["real_doms"], ~other["dom_mask"]
    other["packed_sequences"][cells] = torch.rand(int(cells.sum()), 4) * 9_000
    m["dom_features"][doms] = torch.rand(int(doms.sum()), 3) * 9_000 + 1
    m["sensor_ids"][doms] = torch.randint(0, 5_160, (int(doms.sum()),))
    m["targets"][~m["real_events"]] = 1.
    (loss, gradients), (other_loss, others) = (loss_and_gradients(model, b, "dense") for b in (padded, other))
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, gradients, others))


def test_batches_that_do_not_fit_are_refused(events, batch):
    size = size_of(batch)
    with pytest.raises(ValueError, match="does not fit"): pad_batch(batch, size)
    part = next(split_batch(collate_dom_packing(events, 16), 1))
    with pytest.raises(ValueError, match="parts of events"): padded_by(part)


def test_every_batch_fits_one_of_three_sizes():
    "The sizes hold every batch of the sample, are ascending, and pad less than one size for all."
    rng = np.random.default_rng(0)
    rows = rng.lognormal(3, 0.7, 200).astype(int) + 1
    sizes = [Budget(int(n), int(n) // 2 + 1, int(n) * 300, 64) for n in rows]
    budgets = choose_budgets(sizes)
    assert 1 < len(budgets) <= 3 and all(b.holds(a) for a, b in zip(sizes, [budgets[-1]] * 200, strict=True))
    padded = sum(min(b.rows for b in budgets if b.holds(s)) for s in sizes)
    assert padded < 0.6 * 200 * budgets[-1].rows
    assert padded < 1.9 * rows.sum()
