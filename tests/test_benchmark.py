"""The reference computes the same as the model, operations are counted right, a run leaves whole results."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from iceaggr import benchmark, cli
from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer, padded_step, padded_vector
from iceaggr.packing import collate_dom_packing, reference_collate
from iceaggr.training import TrainSettings, train_step
from iceaggr.yardsticks import needed_operations

QUICK = dict(preset="small", device="cpu", quick=True)


@pytest.fixture
def events(tiny_dataset):
    "Events of which one has a DOM of 600 pulses, more than a sequence holds."
    events = list(IceCubeDataset(tiny_dataset))
    n = 600
    times = torch.arange(float(n)) + 9_000
    long_dom = torch.stack([times, torch.ones(n), torch.full((n,), 77.0), torch.zeros(n)], 1)
    pulses = torch.cat([events[3]["pulse_features"], long_dom])
    events[3] = dict(events[3], pulse_features=pulses[torch.argsort(pulses[:, 0], stable=True)])
    return events


def double_model():
    torch.manual_seed(0)
    return HierarchicalTransformer("small").eval().double()


# --- the reference


@torch.no_grad()
@pytest.mark.parametrize("scores", ["flex", "dense"])
def test_reference_equals_the_model(events, scores):
    model = double_model()
    ours = model.vector(collate_dom_packing(events, 512))
    for collate in (reference_collate, collate_dom_packing):
        padded = padded_vector(model, collate(events, 512), scores)
        torch.testing.assert_close(padded, ours, rtol=1e-9, atol=1e-9)
    other = double_model()
    other.t1.blocks[0].mlp[0].weight.mul_(1.01)
    difference = padded_vector(other, reference_collate(events), scores) - ours
    assert difference.abs().max() > 1e-6     # it does use the weights


def test_training_step_of_the_reference(events):
    batch, ours, reference = collate_dom_packing(events), double_model(), double_model()
    settings = TrainSettings(batch_size=len(events), clip=1.0)
    train_step(ours, torch.optim.SGD(ours.parameters(), lr=1e-2), batch, settings, 1e-2)
    padded_step(reference, torch.optim.SGD(reference.parameters(), lr=1e-2), batch)
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)


def test_reference_collate_holds_every_pulse_once(events):
    batch = reference_collate(events, 128)
    packed = batch["packed_sequences"][batch["dom_mask"]].numpy()
    pulses = np.concatenate([e["pulse_features"].numpy() for e in events])
    assert np.array_equal(packed[np.lexsort(packed.T)], pulses[np.lexsort(pulses.T)])
    for local, ids in zip(batch["dom_boundaries"], batch["metadata"]["global_dom_ids"], strict=True):
        n = int((ids >= 0).sum())     # DOMs of a sequence are numbered from 0 in order
        assert torch.equal(local[:n], torch.unique_consecutive(ids[:n], return_inverse=True)[1])
        assert (local[n:] == -1).all()


# --- operations


def linear(inputs, outputs):
    return 2 * inputs * outputs


def layer(width, spans):
    "Operations of a layer, token by token; a single token bypasses it."
    total = 0
    for span in spans:
        if span == 1: continue
        for _ in range(span):
            perceptron = linear(width, 4 * width) + linear(4 * width, width)
            total += 4 * linear(width, width) + perceptron + 2 * sum(2 * width for _ in range(span))
    return total


def pool(width, tokens):
    logits = tokens * linear(width, 4) if tokens > 1 else 0
    return tokens * linear(width, width) + logits


@pytest.mark.parametrize("preset", ["small", "base"])
def test_operations_by_counting_one_by_one(preset):
    model = HierarchicalTransformer(preset)
    s, encoder = model.settings, model.t2.encoder
    C, E = s.dom_d_model, s.event_d_model
    events = [[1, 1, 3], [1], [2, 600, 512, 1, 513]]     # pulses of each DOM
    t1 = t2 = 0
    for doms in events:
        for n in doms:
            chunks = [512] * (n // 512) + ([n % 512] if n % 512 else [])
            t1 += n * linear(model.t1.encoder.proj.in_features, C)
            t1 += s.dom_layers * layer(C, chunks) + pool(C, n)
        inputs = [encoder.place, encoder.light, encoder.moments, encoder.source]
        token = linear(C, E) + sum(linear(x.in_features, E) for x in inputs)
        t2 += len(doms) * token + s.event_layers * layer(E, [len(doms)]) + pool(E, len(doms))
        t2 += 2 * linear(E, E) + linear(E, 3) + linear(E, 1)     # direction; confidence
    counts, event_doms = torch.tensor(sum(events, [])), torch.tensor([len(doms) for doms in events])
    assert needed_operations(counts, event_doms, model) == {"T1": t1, "T2": t2, "T1 + T2": t1 + t2}


# --- a run


def test_quick_run_writes_whole_results(tiny_dataset, tmp_path):
    out = tmp_path / "new/machine.json"
    results = benchmark.run_benchmarks(tiny_dataset, out, **QUICK, progress=False)
    assert json.loads(out.read_text()) == results and not results["errors"], results["errors"]
    assert set(results["measured"]) == set(benchmark.CPU_MEASUREMENTS)
    no_bfloat16 = not results["machine"]["bfloat16_hardware"]
    for measure, path, *_ in benchmark.WANTED:
        left_out = path.startswith("memory.extreme") or (path == "inference.bfloat16_ratio" and no_bfloat16)
        assert left_out or np.isfinite(benchmark.look_up(results, path)), measure
    figures = {f"machine-{name}.png" for name in benchmark.PLOTS}
    assert {path.name for path in out.parent.iterdir()} == {"machine.json", *figures}
    assert all(row["bytes"] > 1e6 for row in results["measured"]["memory"]["rows"])


def test_a_failure_is_reported_and_the_rest_goes_on(tiny_dataset, tmp_path, monkeypatch, capsys):
    def broken(b): raise RuntimeError("no luck")
    monkeypatch.setitem(benchmark.CPU_MEASUREMENTS, "collate", broken)
    chosen = ("collate", "packing")
    results = benchmark.run_benchmarks(tiny_dataset, tmp_path / "x.json", **QUICK, only=chosen)
    assert results["errors"] == {"collate": "RuntimeError: no luck"}
    assert set(results["measured"]) == {"packing"}
    assert "collate failed: RuntimeError: no luck" in capsys.readouterr().out
    table = benchmark.wanted_table(results)
    assert len(table) == 2 and table.measure.str.startswith("collate").all()     # named, not left out


def test_an_interrupted_run_keeps_what_it_has_measured(tiny_dataset, tmp_path, monkeypatch):
    def interrupted(b): raise KeyboardInterrupt
    monkeypatch.setitem(benchmark.CPU_MEASUREMENTS, "packing", interrupted)     # comes after collate
    out, chosen = tmp_path / "x.json", ("collate", "packing")
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_benchmarks(tiny_dataset, out, **QUICK, only=chosen, progress=False)
    found = json.loads(out.read_text())
    assert set(found["measured"]) == {"collate"} and found["settings"]["minutes"] > 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["x.json"]


def test_wanted_table_judges():
    measured = {
        "collate": {"prepared_ratio": 40.0, "prepared_pulses_per_s": 7.9e6},
        "latency": {"seconds": 0.012},
        "bfloat16": {"ratio": 0.1, "error_change": 0.02},
        "training": {},
    }
    settings = {"device": "cpu", "quick": False}
    results = dict(machine={"bfloat16_hardware": False}, settings=settings, errors={}, measured=measured)
    holds = benchmark.wanted_table(results).holds.tolist()
    assert holds == ["yes", "no", "no bfloat16 hardware", "no", "yes"]


@pytest.mark.parametrize("args, expected", [
    ([], (None, "auto", None, False)),
    (["--quick"], (None, None, None, True)),
    (["--data", "d", "--out", "x.json", "--device", "cpu", "--quick"], ("d", "x.json", "cpu", True)),
])
def test_the_command_passes_its_options_on(args, expected, monkeypatch, capsys):
    called, errors = [], {}

    def run(data, out, device, quick):
        called.append((data, out, device, quick))
        return dict(errors=errors)

    monkeypatch.setattr(benchmark, "run_benchmarks", run)
    assert cli.main(["bench", *args]) == 0 and called == [expected]
    errors.update(collate="no luck", memory="none either")
    assert cli.main(["bench", *args]) == 1
    assert "error: measurements failed: collate, memory" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_run_on_cuda(tiny_dataset):
    options = dict(QUICK, device="cuda")
    results = benchmark.run_benchmarks(tiny_dataset, None, **options, progress=False)
    assert not results["errors"], results["errors"]
    measured = results["measured"]
    assert measured["cuda_loops"]["inference"]["new_graphs"] == 0
    assert measured["cuda_training_bfloat16"]["new_graphs"] == 0
    assert results["measured"]["cuda_exactness"]["largest"] < 0.05


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="the mark is reset through /proc")
@pytest.mark.slow
def test_peak_memory_of_a_child_is_its_own():
    "A parent that holds 500 MB does not lend its mark to a child that needs 50 MB."
    held = np.ones(500_000_000, np.uint8)
    code = """
import numpy as np
from iceaggr.benchmark import resident_memory
before = resident_memory()
x = np.ones(50_000_000, np.uint8)
del x
print(resident_memory(peak=True) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 45e6 < int(done.stdout) < 200e6 and held[0]


@pytest.mark.parametrize("options", [dict(), dict(compiled=False), dict(precision="float32")])
def test_measurement_of_training_without_a_gpu(tiny_dataset, tmp_path, options):
    "What `--device cuda` measures, on a CPU: no new graphs, no skipped steps, at most three shapes."
    b = benchmark.Bench(tmp_path, tiny_dataset, "small", "cpu", quick=True)
    found = benchmark.cuda_training(b, backend="aot_eager", batch_size=8, **options)
    assert found["events_per_s"] > 0 and found["new_graphs"] == 0 and found["skipped"] == 0
    assert found["shapes"] is None or 1 <= found["shapes"] <= 3
    assert found["matrix_share"] > 0 and np.isfinite(found["loss"])


def test_measurement_of_compiled_inference_without_a_gpu(tiny_dataset, tmp_path):
    b = benchmark.Bench(tmp_path, tiny_dataset, "small", "cpu", quick=True)
    found = benchmark.cuda_inference_compiled(b, backend="aot_eager")
    assert found["best_events_per_s"] > 0 and all(s > 0 for s in found["compile_seconds"].values())


def test_counts_of_a_step(tiny_dataset, tmp_path):
    "Of the preset `small`: fewer operations than the plain step, and no read."
    found = benchmark.measure_graph(benchmark.Bench(tmp_path, tiny_dataset, "small", "cpu", quick=True))
    assert found["device"]["host_reads"] == 0 < found["plain"]["host_reads"]
    assert found["device"]["operations"] < found["plain"]["operations"]
