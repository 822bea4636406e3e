"""An event of 150,000 pulses on 2,500 DOMs: memory in inference and in a training step."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from iceaggr.benchmark import resident_memory
from iceaggr.data import IceCubeDataset
from iceaggr.benchmark import pile_up
from iceaggr.io.frames import frame_to_events
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import demo_dataset
from iceaggr.training import TrainSettings, train_step
Path("/proc/self/clear_refs").write_text("5")                 # the high-water mark starts anew
before = resident_memory()
ds = IceCubeDataset(os.environ.get("ICEAGGR_PPC") or demo_dataset(), batch_ids=[1], max_events=300)
pulses = pile_up([ds[i] for i in range(len(ds))], 150_000, 2_500)
torch.manual_seed(0)
model = HierarchicalTransformer(sys.argv[1], ds.geometry)
if sys.argv[2] == "predict":
    table = model.predict(pulses)
    finite = bool(table.notna().all().all()) and len(table) == 1
else:
    batch = collate_dom_packing(frame_to_events(pulses))
    batch["metadata"]["targets"] = torch.tensor([[1., 1.]])
    optimizer = torch.optim.AdamW(model.parameters())
    finite = train_step(model, optimizer, batch, TrainSettings(), 1e-3) is not None
more = resident_memory(peak=True) - before
print(json.dumps(dict(pulses=len(pulses), doms=int(pulses.sensor_id.nunique()), finite=finite, more=more)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "preset, what, limit",
    [
        ("small", "predict", 300e6),
        pytest.param("base", "predict", 300e6, marks=pytest.mark.slow),
        ("small", "train", 1e9),
        pytest.param("base", "train", 1e9, marks=pytest.mark.slow),
    ],
)
def test_extreme_event_in_bounded_memory(preset, what, limit):
    run = subprocess.run([sys.executable, "-c", SCRIPT, preset, what], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    print(found)
    assert (found["pulses"], found["doms"], found["finite"]) == (150_000, 2_500, True)
    assert found["more"] < limit
