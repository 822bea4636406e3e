"""The CUDA path: the same results as on the CPU, and no return to uncompiled attention."""
import copy

import pytest
import torch
from definitions import assert_same_gradients, embeddings_of, gradients, in_float64
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from iceaggr import attention
from iceaggr.attention import PackedLayout, dense_attention, segment_block_mask
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vmf_loss
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch, to_device
from iceaggr.training import MuonAdamW, TrainSettings, train_step

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_many_shapes_stay_compiled():
    "More lengths than torch keeps compiled by default, each compiled once; a backend that only counts."
    torch._dynamo.reset()
    attention.compiled_flex_attention.cache_clear()
    attention.compiled_flex_attention()                        # sets the limits
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    for repeat in range(2):
        for n in range(1, 13):
            ids = torch.arange(128 * n)[None] // (7 + repeat)
            q = torch.randn(1, 1, 128 * n, 16)
            compiled(q, q, q, block_mask=segment_block_mask(ids))
        assert counter.frame_count == 12
    torch._dynamo.reset()


@cuda
def test_compiled_attention_agrees_with_the_definition():
    "Values and gradients of eight packed sequences."
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (8, 512), generator=generator)
    local = [torch.arange(512).repeat_interleave(row)[:512] for row in lengths]
    ids = torch.stack(local).cuda()
    ids[:, 460:] = -1
    unique = ids + 1_000 * torch.arange(8, device="cuda")[:, None]
    qkv = torch.randn(8 * 512, 3 * 128, generator=generator).cuda().requires_grad_()
    found = PackedLayout(ids).attend(qkv, n_heads=8)
    expected = dense_attention(qkv.double(), unique.flatten(), n_heads=8)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert_same_gradients(gradients(found, [qkv]), gradients(expected, [qkv]))


@pytest.fixture
def events(tiny_dataset):
    return list(IceCubeDataset(tiny_dataset))


@pytest.fixture
def on_cpu(events):
    "A model and a batch."
    torch.manual_seed(0)
    return HierarchicalTransformer("small"), collate_dom_packing(events)


@pytest.fixture
def on_gpu(on_cpu):
    "Copies of them."
    model, batch = on_cpu
    return copy.deepcopy(model).cuda(), to_device(batch, "cuda")


def loss_of(model, batch):
    return vmf_loss(model.vector(batch), angles_to_vector(*batch["metadata"]["targets"].T))


@cuda
def test_t1_agrees_with_its_definition(on_cpu, on_gpu):
    "Float32 on the GPU against a loop over DOMs in float64."
    (model, batch), (gpu_model, gpu_batch) = on_cpu, on_gpu
    with torch.no_grad():
        expected = embeddings_of(in_float64(model.t1), batch)
        found, _ = gpu_model.t1(gpu_batch)
    assert (found.cpu().double() - expected).abs().max() < 1e-4


@cuda
def test_t2_agrees_with_the_cpu(on_cpu, on_gpu):
    (model, batch), (gpu_model, _) = on_cpu, on_gpu
    with torch.no_grad():
        t2_batch = model.t2_batch(batch)
        found = gpu_model.t2.vector(**to_device(t2_batch, "cuda"))
        assert (found.cpu() - model.t2.vector(**t2_batch)).abs().max() < 1e-4


@cuda
def test_values_and_gradients(on_cpu, on_gpu):
    (model, batch), (gpu_model, gpu_batch) = on_cpu, on_gpu
    loss, gpu_loss = loss_of(model, batch), loss_of(gpu_model, gpu_batch)
    assert abs(loss.item() - gpu_loss.item()) < 1e-3
    loss.backward()
    gpu_loss.backward()
    for (name, p), q in zip(model.named_parameters(), gpu_model.parameters(), strict=True):
        assert (p.grad - q.grad.cpu()).norm() <= 1e-2 * p.grad.norm() + 1e-5, name


@cuda
def test_predict_in_parts(on_cpu, on_gpu):
    "Parts of a batch, on the GPU or brought there."
    (model, batch), (gpu_model, gpu_batch) = on_cpu, on_gpu
    columns = ["azimuth", "zenith"]
    expected = model.predict(batch)[columns].to_numpy()
    for parts in (gpu_batch, list(split_batch(gpu_batch, 1)), list(split_batch(batch, 1))):
        found = gpu_model.predict(parts, max_sequences=1)[columns].to_numpy()
        assert abs(found - expected).max() < 1e-2


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss(events, on_gpu, precision):
    model, batch = on_gpu
    optimizer = MuonAdamW(model, 1e-3)
    settings = TrainSettings(batch_size=len(events), precision=precision)
    losses = [train_step(model, optimizer, batch, settings, 1e-3) for _ in range(30)]
    assert all(loss is not None for loss in losses)
    assert losses[-1] < losses[0]


@cuda
def test_grouped_layout_on_the_gpu(on_cpu, on_gpu):
    (model, batch), (gpu_model, gpu_batch) = on_cpu, on_gpu
    gpu_model.t1.kernel = gpu_model.t2.kernel = "grouped"
    assert (gpu_model.vector(gpu_batch).cpu() - model.vector(batch)).abs().max() < 1e-3
