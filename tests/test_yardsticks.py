"""What speed is measured against: the count of operations, attention over all pulses, one extreme event."""
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iceaggr.data import IceCubeDataset
from iceaggr.dom_transformer import padded_t1
from iceaggr.model import HierarchicalTransformer, padded_t2
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.yardsticks import FullPulseTransformer, batch_operations, padded_events, pile_up


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yardsticks") / "data"
    return IceCubeDataset(simulate_dataset(folder, 100, events_per_file=100, progress=False))


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(0)
    return HierarchicalTransformer("small", dataset.geometry).eval()


def executed_operations(call):
    "Operations of the matrix products of a call, as torch counts them; the counter sees one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad(): call()
    finally:
        torch.set_num_threads(threads)
    return flops.get_total_flops()


def without_single_pulses(event):
    "The pulses of DOMs that have two or more."
    pulses = event["pulse_features"]
    _, dom, counts = pulses[:, 2].unique(return_inverse=True, return_counts=True)
    keep = counts[dom] > 1
    return dict(event, pulse_features=pulses[keep], n_pulses=keep.sum())


def dom_by_dom(event):
    "One event per DOM."
    pulses = event["pulse_features"]
    return [dict(event, pulse_features=pulses[pulses[:, 2] == sensor]) for sensor in pulses[:, 2].unique()]


def test_formula_equals_what_torch_counts(dataset, model):
    "Through dense masks, one DOM and one event at a time, nothing is padded: both counts agree."
    events = [without_single_pulses(dataset[i]) for i in range(12)]
    events = [e for e in events if len(e["pulse_features"][:, 2].unique()) > 1]
    total = 0
    for event in events:
        for dom in dom_by_dom(event):
            batch = collate_dom_packing([dom], len(dom["pulse_features"]))
            total += executed_operations(lambda batch=batch: padded_t1(model.t1, batch, "dense"))
        batch = collate_dom_packing([event])
        with torch.no_grad(): embeddings = model.t1(batch)[0]
        total += executed_operations(lambda e=embeddings, b=batch: padded_t2(model.t2, e, b["metadata"]))
    assert total == batch_operations(collate_dom_packing(events), model)["T1 + T2"]


@pytest.mark.parametrize("fused", [True, False])
def test_padding_changes_nothing_in_full_pulse_attention(dataset, fused):
    events = [dataset[i] for i in range(8)]
    torch.manual_seed(0)
    flat = FullPulseTransformer(dataset.geometry, 32, 2, 2, fused).eval()
    with torch.no_grad():
        together = flat(*padded_events(events))
        one_by_one = torch.cat([flat(*padded_events([e])) for e in events])
    torch.testing.assert_close(together, one_by_one, rtol=1e-3, atol=1e-5)


def test_pile_up_keeps_times_and_charges(dataset, model):
    events = [dataset[i] for i in range(60)]
    table = pile_up(events, 20_000, 1_500)
    assert len(table) == 20_000 and table.sensor_id.nunique() == 1_500
    charges = np.concatenate([e["pulse_features"][:, 1].numpy() for e in events])
    assert np.isin(table.charge.to_numpy(np.float32), charges).all()
    whole, in_parts = model.predict(table), model.predict(table, max_sequences=3)
    assert np.allclose(whole[["azimuth", "zenith"]], in_parts[["azimuth", "zenith"]], atol=1e-4)
