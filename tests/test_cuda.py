"""The CUDA path: the same results as on the CPU, and no return to uncompiled attention."""
import copy
import dataclasses

import numpy as np
import pytest
import torch
from definitions import assert_same_gradients, embeddings_of, gradients, in_float64
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from iceaggr import attention, training
from iceaggr.attention import PackedLayout, dense_attention, segment_block_mask
from iceaggr.augmentation import draw_random, perturb_padded
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vmf_loss
from iceaggr.engine.budget import Budget, pad_batch, size_of
from iceaggr.engine.device_steps import DeviceStep
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch, to_device
from iceaggr.testing import write_tiny
from iceaggr.training import MuonAdamW, TrainSettings, _batch_loss, train_step

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


def padded(batch, rows=2):
    "The batch with more sequences, DOMs and events, on the GPU."
    size = size_of(batch)
    return to_device(pad_batch(batch, Budget(size.rows + rows, size.layer_rows, size.doms + 50, 24)), "cuda")


def steps_on_device(model, batches, n=20, precision="float32", **options):
    "Losses of some steps, batches in turns, and the step."
    model = copy.deepcopy(model)
    def loss(batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            vector = model.vector(batch)
        return _batch_loss(vector, batch)
    step = DeviceStep(model, copy.deepcopy(model), MuonAdamW(model, 1e-3), loss, 21, 1., **options)
    for i in range(n): step(1e-3, 1e-3, batches[i % len(batches)])
    return step.read(), step


@cuda
def test_padding_changes_nothing(on_cpu, on_gpu):
    (_, batch), (gpu_model, gpu_batch) = on_cpu, on_gpu
    with torch.no_grad():
        expected, found = gpu_model.vector(gpu_batch), gpu_model.vector(padded(batch))
    assert (found[:len(expected)] - expected).abs().max() < 1e-4


@cuda
@pytest.mark.parametrize("precision, rtol", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_compiled_and_recorded_steps_agree_with_eager(on_cpu, on_gpu, precision, rtol):
    "Twenty steps on two sizes of batch, with one recorded graph for each."
    (_, batch), (model, _) = on_cpu, on_gpu
    batches = [padded(batch), padded(batch, 9)]
    eager, _ = steps_on_device(model, batches, precision=precision)
    compiled, _ = steps_on_device(model, batches, precision=precision, backend="inductor")
    recorded, step = steps_on_device(model, batches, precision=precision, backend="inductor", capture=True)
    assert np.allclose(compiled[:5], eager[:5], rtol=rtol) and np.allclose(recorded[:5], eager[:5], rtol=rtol)
    assert np.allclose(compiled, eager, rtol=20 * rtol) and np.allclose(recorded, eager, rtol=20 * rtol)
    assert len(step.graphs) == 2 and None not in step.graphs.values()


@cuda
def test_recording_changes_nothing(on_cpu, on_gpu):
    "The steps that warm up leave weights and state as they are."
    (_, batch), (model, _) = on_cpu, on_gpu
    _, once = steps_on_device(model, [padded(batch)], n=1)
    _, recorded = steps_on_device(model, [padded(batch)], n=1, capture=True)
    for p, q in zip(once.params, recorded.params, strict=True): assert torch.allclose(p, q, atol=1e-5)


@cuda
def test_the_host_never_waits(on_cpu, on_gpu):
    "torch raises where the host would wait for the GPU: augmentation and a whole step, eager."
    (_, batch), (model, _) = on_cpu, on_gpu
    fixed = padded(batch)
    _, step = steps_on_device(model, [fixed], n=2)             # compiles FlexAttention
    generator = torch.Generator("cuda").manual_seed(0)
    perturb_padded(fixed, draw_random(fixed, generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        perturb_padded(fixed, draw_random(fixed, generator))
        step(1e-3, 1e-3, fixed)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert step.read()[0] is not None


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_run_learns_like_a_plain_one(tmp_path, precision):
    "Two epochs of `fit`, with `compile` and without: losses alike, no step skipped, a resumable checkpoint."
    data = write_tiny(tmp_path / "data", {1: 160, 2: 50})
    train_ds, valid_ds = (IceCubeDataset(data, batch_ids=[n]) for n in (1, 2))
    settings = TrainSettings(epochs=2, batch_size=16, valid_events=50, lr=1e-3, precision=precision)
    logs = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model, run = HierarchicalTransformer("small").cuda(), tmp_path / str(compiled)
        run.mkdir()
        own = dataclasses.replace(settings, compile=compiled)
        logs.append(training.fit(model, train_ds, valid_ds, run, own, progress=False))
    assert np.allclose(logs[0].train_loss, logs[1].train_loss, rtol=0.03)
    assert (logs[0].skipped_steps == 0).all()
    model = HierarchicalTransformer("small").cuda()
    again = training.fit(model, train_ds, valid_ds, tmp_path / "True", settings, resume=True, progress=False)
    assert np.array_equal(again.train_loss, logs[0].train_loss)
