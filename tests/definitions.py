"""T1, T2 and their blocks from the definition: one segment after the other, without layouts."""
import copy

import torch

from iceaggr.event_transformer import describe_events
from iceaggr.packing import batch_event_times


def block_of(block, x): # (n, C), one segment
    "A transformer block on the tokens of one segment."
    n, C = x.shape
    H = block.attention.n_heads
    q, k, v = block.attention.qkv(block.norm1(x)).view(n, 3, H, C // H).permute(1, 2, 0, 3)
    weight = (q @ k.transpose(1, 2) / (C // H) ** 0.5).softmax(-1)
    x = x + block.attention.out((weight @ v).transpose(0, 1).reshape(n, C))
    hidden = block.mlp[0](block.norm2(x)).clamp(min=0) ** 2
    return x + block.mlp[2](hidden)


def blocks_of(blocks, x): # (n, C), one segment
    "All blocks on the tokens of one segment; a single token bypasses them."
    if len(x) == 1: return x
    for block in blocks: x = block_of(block, x)
    return x


def attention_pool_of(pool, x): # (n, C) -> (C,)
    "Attention pooling of one segment."
    x = pool.norm(x)
    weight = pool.logits(x).softmax(0)                                   # (n, Q)
    value = pool.value(x).view(len(x), pool.n_queries, -1)               # (n, Q, C / Q)
    return (weight[:, :, None] * value).sum(0).flatten()


def mean_pool_of(pool, x): # (n, C) -> (C,)
    "Mean pooling of one segment."
    return pool.norm(x).mean(0)


def embeddings_of(t1, batch, pool_of=attention_pool_of): # (D, C)
    "T1, a loop over DOMs: attention inside chunks of at most L pulses, pooling over the whole DOM."
    m, L = batch["metadata"], batch["packed_sequences"].shape[1]
    event_time = batch_event_times(m)[m["dom_to_event_idx"]]             # (D,)
    found = []
    for dom in range(m["total_doms"]):
        pulses = batch["packed_sequences"][m["global_dom_ids"] == dom]   # (n, 4)
        pulses = pulses[pulses[:, 0].argsort(stable=True)]
        first_time = m["dom_features"][dom, 0].expand(len(pulses))
        x = t1.encoder(pulses, event_time[dom].expand(len(pulses)), first_time)
        x = torch.cat([blocks_of(t1.blocks, chunk) for chunk in x.split(L)])
        found.append(pool_of(t1.pool, x))
    return torch.stack(found)


def vectors_of(t2, dom_embeddings, dom_ids, event, n_events, dom_features): # (B, 3)
    "T2, a loop over events."
    sensors = t2.sensors[dom_ids]
    references = describe_events(sensors, dom_ids, dom_features, event, n_events)
    found = []
    for n in range(n_events):
        doms = event == n
        measured_from = [reference[event[doms]] for reference in references]
        x = t2.embed(dom_embeddings[doms]) + t2.encoder(sensors[doms], dom_features[doms], *measured_from)
        pooled = attention_pool_of(t2.pool, blocks_of(t2.blocks, x))
        v = t2.head(pooled)
        found.append(v * (1 + v.norm()) * torch.exp(t2.confidence(pooled)))
    return t2.calibrated(torch.stack(found))


def in_float64(module):
    "A copy of a module in double precision."
    return copy.deepcopy(module).double()


def trained(model):
    "The parameters that training changes."
    return [p for p in model.parameters() if p.requires_grad]


def gradients(value, inputs):
    "Gradients of a fixed random projection of a value, in float64."
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value.dtype)
    return [g.double() for g in torch.autograd.grad((value * weight).sum(), inputs)]


def assert_same_gradients(found, expected, tolerance=1e-4):
    "Each gradient differs by less than `tolerance` of its norm."
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9, number
