"""The weights that come with the package."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import iceaggr
from iceaggr.data import IceCubeDataset
from iceaggr.direction import vmf_quantile
from iceaggr.geometry import load_geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation import simulate_dataset
from iceaggr.training import predict_with_truth

WEIGHTS = Path(iceaggr.__file__).parent / "pretrained"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    "Events with the detector of the weights."
    return IceCubeDataset(simulate_dataset(tmp_path_factory.mktemp("simulated") / "data", 500, seed=77, events_per_file=500, geometry=load_geometry(WEIGHTS / "small.safetensors"), progress=False))


@pytest.mark.parametrize("name", ["small", "base"])
def test_on_simulated_events(simulated, name):
    "The mean error, and whether kappa is honest."
    error, kappa, _ = predict_with_truth(HierarchicalTransformer.from_pretrained(name), simulated)
    assert float(torch.rad2deg(error.mean())) < 22
    assert 0.6 < float((error <= vmf_quantile(kappa, 0.68)).double().mean()) < 0.78


@pytest.mark.skipif("ICEAGGR_PPC" not in os.environ, reason="needs full-physics events: ICEAGGR_PPC")
@pytest.mark.parametrize("name", ["small", "base"])
def test_on_full_physics_events(name):
    dataset = IceCubeDataset(os.environ["ICEAGGR_PPC"], batch_ids=[4])
    some = np.sort(np.random.default_rng(0).choice(len(dataset), 1_000, replace=False))
    error, _, _ = predict_with_truth(HierarchicalTransformer.from_pretrained(name), dataset, some)
    assert float(torch.rad2deg(error.mean())) < 18


def test_small_enough_and_described():
    assert sum(p.stat().st_size for p in WEIGHTS.glob("*.safetensors")) < 12e6
    for path in WEIGHTS.glob("*.safetensors"): assert path.stem in path.with_suffix(".md").read_text()
