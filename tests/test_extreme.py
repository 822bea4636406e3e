"""An event of 150,000 pulses on 2,500 DOMs goes through `predict` within 2 GB of process memory."""
import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, resource, sys
import torch
torch.set_num_threads(2)
from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer, pile_up
from iceaggr.simulation import demo_dataset
ds = IceCubeDataset(os.environ.get("ICEAGGR_PPC") or demo_dataset(), batch_ids=[1], max_events=300)
pulses = pile_up([ds[i] for i in range(len(ds))], 150_000, 2_500)
torch.manual_seed(0)
table = HierarchicalTransformer(sys.argv[1], ds.geometry).predict(pulses)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(dict(pulses=len(pulses), doms=int(pulses.sensor_id.nunique()), finite=bool(table.notna().all().all()), rows=len(table), peak=peak)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read with the resource module")
@pytest.mark.parametrize("preset", ["small", "base"])
def test_extreme_event_in_2_gb(preset):
    run = subprocess.run([sys.executable, "-c", SCRIPT, preset], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    print(found)
    assert (found["pulses"], found["doms"], found["rows"], found["finite"]) == (150_000, 2_500, 1, True)
    assert found["peak"] < 2e9
