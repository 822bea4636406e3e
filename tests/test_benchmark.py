"""What the speed is measured against computes the same, operations are counted right, and a run leaves whole results."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from iceaggr import benchmark, cli
from iceaggr.data import IceCubeDataset
from iceaggr.geometry import Geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.benchmark import FullPulseTransformer, needed_operations, padded_events
from iceaggr.model import padded_step, padded_vector
from iceaggr.packing import reference_collate
from iceaggr.training import TrainSettings, train_step


@pytest.fixture
def events(tiny_dataset):
    "Events of which one has a DOM of 600 pulses, more than a sequence holds."
    some = list(IceCubeDataset(tiny_dataset))
    long = torch.stack([torch.arange(600.) + 9_000, torch.ones(600), torch.full((600,), 77.), torch.zeros(600)], 1)
    some[3] = dict(some[3], pulse_features=torch.cat([some[3]["pulse_features"], long])[torch.argsort(torch.cat([some[3]["pulse_features"], long])[:, 0], stable=True)])
    return some


def double_model():
    torch.manual_seed(0)
    return HierarchicalTransformer("small").eval().double()


@torch.no_grad()
@pytest.mark.parametrize("scores", ["flex", "dense"])
def test_reference_equals_the_model(events, scores):
    model = double_model()
    ours = model.vector(collate_dom_packing(events, 512))
    for collate in (reference_collate, collate_dom_packing):
        torch.testing.assert_close(padded_vector(model, collate(events, 512), scores), ours, rtol=1e-9, atol=1e-9)
    other = double_model()
    other.t1.blocks[0].mlp[0].weight.mul_(1.01)
    assert (padded_vector(other, reference_collate(events), scores) - ours).abs().max() > 1e-6          # it does use the weights


def test_training_step_of_the_reference(events):
    batch, models = collate_dom_packing(events), [double_model(), double_model()]
    settings = TrainSettings(batch_size=len(events), clip=1.)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in models]
    train_step(models[0], optimizers[0], batch, settings, 1e-2)
    padded_step(models[1], optimizers[1], batch)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()): torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_reference_collate_holds_every_pulse_once(events):
    batch = reference_collate(events, 128)
    mask = batch["dom_mask"]
    got, want = batch["packed_sequences"][mask].numpy(), np.concatenate([e["pulse_features"].numpy() for e in events])
    order = lambda x: x[np.lexsort(x.T)]
    assert np.array_equal(order(got), order(want))
    for local, ids in zip(batch["dom_boundaries"], batch["metadata"]["global_dom_ids"]):                 # DOMs of a sequence are numbered from 0 in order
        n = int((ids >= 0).sum())
        assert torch.equal(local[:n], torch.unique_consecutive(ids[:n], return_inverse=True)[1]) and (local[n:] == -1).all()


@pytest.mark.parametrize("preset", ["small", "base"])
def test_operations_by_counting_one_by_one(preset):
    model = HierarchicalTransformer(preset)
    s, per_event = model.settings, [[1, 1, 3], [1], [2, 600, 512, 1, 513]]
    C, E = s.dom_d_model, s.event_d_model
    linear = lambda i, o: 2 * i * o
    def layer(width, spans):                                   # token by token
        total = 0
        for span in spans:
            for _ in range(span if span > 1 else 0):           # a token alone passes the layers by
                total += 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + 2 * sum(2 * width for _ in range(span))
        return total
    t1 = t2 = 0
    for doms in per_event:
        for n in doms:
            spans = [512] * (n // 512) + ([n % 512] if n % 512 else [])
            t1 += n * linear(model.t1.encoder.proj.in_features, C) + s.dom_layers * layer(C, spans) + n * linear(C, C) + (n * linear(C, 4) if n > 1 else 0)
        D, e = len(doms), model.t2.encoder
        t2 += D * (linear(C, E) + linear(e.place.in_features, E) + linear(e.light.in_features, E) + linear(e.moments.in_features, E) + linear(e.source.in_features, E))
        t2 += s.event_layers * layer(E, [D]) + D * linear(E, E) + (D * linear(E, 4) if D > 1 else 0) + linear(E, E) + linear(E, 3)
    found = needed_operations(torch.tensor(sum(per_event, [])), torch.tensor([len(d) for d in per_event]), model)
    assert found == {"T1": t1, "T2": t2, "T1 + T2": t1 + t2}


@torch.no_grad()
def test_full_pulse_attention_sees_no_padding(events):
    model = FullPulseTransformer(Geometry.nominal(), 32, 2, 2).eval()
    together, alone = model(*padded_events(events)), torch.cat([model(*padded_events([e])) for e in events])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_quick_run_writes_whole_results(tiny_dataset, tmp_path):
    out = tmp_path / "new/machine.json"
    results = benchmark.run_benchmarks(tiny_dataset, out, preset="small", device="cpu", quick=True, progress=False)
    assert json.loads(out.read_text()) == results and not results["errors"], results["errors"]
    assert set(results["measured"]) == set(benchmark.CPU_MEASUREMENTS)
    for measure, path, *_ in benchmark.WANTED:
        quick = path.startswith("memory.extreme") or (path == "inference.bfloat16_ratio" and not results["machine"]["bfloat16_hardware"])
        assert quick or np.isfinite(benchmark.look_up(results, path)), measure
    assert {p.name for p in out.parent.iterdir()} == {"machine.json", *(f"machine-{name}.png" for name in benchmark.PLOTS)}
    for r in results["measured"]["memory"]["rows"]: assert r["bytes"] > 1e6                              # the process did something


def test_a_failure_is_reported_and_the_rest_goes_on(tiny_dataset, tmp_path, monkeypatch, capsys):
    def broken(b): raise RuntimeError("no luck")
    monkeypatch.setitem(benchmark.CPU_MEASUREMENTS, "collate", broken)
    results = benchmark.run_benchmarks(tiny_dataset, tmp_path / "x.json", preset="small", device="cpu", quick=True, only=("collate", "packing"))
    assert results["errors"] == {"collate": "RuntimeError: no luck"} and set(results["measured"]) == {"packing"}
    assert "collate failed: RuntimeError: no luck" in capsys.readouterr().out
    table = benchmark.wanted_table(results)
    assert len(table) == 2 and table.measure.str.startswith("collate").all()                             # missing, not left out


def test_what_is_cut_off_leaves_what_it_has_measured(tiny_dataset, tmp_path, monkeypatch):
    def interrupted(b): raise KeyboardInterrupt
    monkeypatch.setitem(benchmark.CPU_MEASUREMENTS, "packing", interrupted)                              # comes after collate
    with pytest.raises(KeyboardInterrupt): benchmark.run_benchmarks(tiny_dataset, tmp_path / "x.json", preset="small", device="cpu", quick=True, only=("collate", "packing"), progress=False)
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found["measured"]) == {"collate"} and found["settings"]["minutes"] > 0 and [p.name for p in tmp_path.iterdir() if p.suffix == ".json"] == ["x.json"]


def test_wanted_table_judges():
    results = dict(machine=dict(bfloat16_hardware=False), settings=dict(device="cpu", quick=False), errors={},
                   measured=dict(collate=dict(prepared_ratio=40., prepared_pulses_per_s=7.9e6), latency=dict(seconds=0.012), bfloat16=dict(ratio=0.1, error_change=0.02), training={}))
    assert benchmark.wanted_table(results).holds.tolist() == ["yes", "no", "no bfloat16 hardware", "no", "yes"]


@pytest.mark.parametrize("args, expected", [
    ([], (None, "auto", None, False)), (["--quick"], (None, None, None, True)), (["--data", "d", "--out", "x.json", "--device", "cpu", "--quick"], ("d", "x.json", "cpu", True))])
def test_the_command_passes_on_what_is_wanted(args, expected, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(benchmark, "run_benchmarks", lambda data, out, device, quick: called.append((data, out, device, quick)) or dict(errors=errors))
    errors = {}
    assert cli.main(["bench", *args]) == 0 and called == [expected]
    errors = dict(collate="no luck", memory="none either")
    assert cli.main(["bench", *args]) == 1 and "error: measurements failed: collate, memory" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_run_on_cuda(tiny_dataset):
    results = benchmark.run_benchmarks(tiny_dataset, None, preset="small", device="cuda", quick=True, progress=False)
    assert not results["errors"], results["errors"]
    loops = results["measured"]["cuda_loops"]
    assert loops["inference"]["new_graphs"] == loops["training"]["new_graphs"] == 0
    assert results["measured"]["cuda_exactness"]["largest"] < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the mark is set back through /proc")
def test_peak_memory_of_a_child_is_its_own(tmp_path):
    "A parent that holds 500 MB does not lend its mark to a child that needs 50 MB."
    held = np.ones(500_000_000, np.uint8)
    code = "import numpy as np; from iceaggr.benchmark import resident_memory as r; a = r(); x = np.ones(50_000_000, np.uint8); del x; print(r(peak=True) - a)"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 45e6 < peak < 200e6 and held[0]
