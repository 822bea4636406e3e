"""The CUDA path: the same results as on the CPU, and no return to uncompiled attention."""
import copy

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from iceaggr import attention
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vmf_loss
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch, to_device
from iceaggr.training import Muon, MuonAdamW, TrainSettings, train_step

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_many_shapes_stay_compiled():
    "More lengths than torch keeps compiled by default, each compiled once; runs without a GPU, with a backend that only counts."
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    attention.compiled_flex_attention.cache_clear()
    attention.compiled_flex_attention()                        # sets the limits
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    for repeat in range(2):
        for n in range(1, 13):
            ids = torch.arange(128 * n)[None] // (7 + repeat)
            q = torch.randn(1, 1, 128 * n, 16)
            compiled(q, q, q, block_mask=attention.segment_block_mask(ids))
        assert counter.frame_count == 12
    torch._dynamo.reset()


@pytest.fixture
def events(tiny_dataset):
    return [e for e in IceCubeDataset(tiny_dataset)]


def both(events):
    "A model and a batch on the CPU, and copies of them on the GPU."
    torch.manual_seed(0)
    model, batch = HierarchicalTransformer("small"), collate_dom_packing(events)
    return model, batch, copy.deepcopy(model).cuda(), to_device(batch, "cuda")


def loss_of(model, batch):
    return vmf_loss(model.vector(batch), angles_to_vector(*batch["metadata"]["targets"].T))


@cuda
def test_values_and_gradients(events):
    model, batch, gpu, gpu_batch = both(events)
    a, b = loss_of(model, batch), loss_of(gpu, gpu_batch)
    assert abs(a.item() - b.item()) < 1e-3
    a.backward(), b.backward()
    for (name, p), q in zip(model.named_parameters(), gpu.parameters()):
        assert (p.grad - q.grad.cpu()).norm() <= 1e-2 * p.grad.norm() + 1e-5, name


@cuda
def test_predict_in_parts(events):
    model, batch, gpu, gpu_batch = both(events)
    expected = model.predict(batch)[["azimuth", "zenith"]].to_numpy()
    for parts in (gpu_batch, list(split_batch(gpu_batch, 1)), list(split_batch(batch, 1))):
        found = gpu.predict(parts, max_sequences=1)[["azimuth", "zenith"]].to_numpy()
        assert abs(found - expected).max() < 1e-2


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss(events, precision):
    _, _, gpu, batch = both(events)
    optimizer = MuonAdamW(gpu, 1e-3)
    settings = TrainSettings(batch_size=len(events), precision=precision)
    losses = [train_step(gpu, optimizer, batch, settings, 1e-3) for _ in range(30)]
    assert all(x is not None for x in losses) and losses[-1] < losses[0]


@cuda
def test_muon_is_that_of_torch():
    "Two wide matrices together, two tall ones, another shape, and one without a gradient."
    ours, others = ([torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in ((64, 96), (96, 64), (64, 96), (96, 64), (64, 64), (32, 32))] for _ in range(2))
    mine, torchs = Muon(ours, lr=0.1, weight_decay=0.5), torch.optim.Muon(others, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours[:5], others): p.grad = q.grad = torch.randn_like(p)
        mine.step(); torchs.step()
    for p, q in zip(ours[:5], others): assert (p - q).norm() < 0.02 * q.norm()
    assert not ours[5].any()


@cuda
def test_grouped_layout_on_the_gpu(events):
    model, batch, gpu, gpu_batch = both(events)
    gpu.t1.kernel = gpu.t2.kernel = "grouped"
    assert (gpu.vector(gpu_batch).cpu() - model.vector(batch)).abs().max() < 1e-3
