"""A training step as a graph of fixed shapes: no host reads, no graph breaks, the same result as without padding."""
import pytest
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.training import MuonAdamW, TrainSettings, train_step
from iceaggr.yardsticks import OperationCounter


@pytest.fixture
def events(tiny_dataset):
    return list(IceCubeDataset(tiny_dataset))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HierarchicalTransformer(dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32,
                                        event_heads=2, event_layers=1))


def test_counter_finds_the_host_reads_of_a_plain_step(events, model):
    "The packed path on a batch of any shape reads lengths and checks on the host."
    model.t1.kernel = model.t2.kernel = "dense"
    batch, settings = collate_dom_packing(events), TrainSettings(batch_size=len(events))
    with OperationCounter() as counter: train_step(model, MuonAdamW(model, 1e-3), batch, settings, 1e-3)
    assert counter.operations["aten.nonzero.default"] == counter.host_reads["aten.nonzero.default"] == 1
    assert counter.host_reads["aten._local_scalar_dense.default"] > 4
    assert counter.host_reads["aten.bincount.default"] == 2
