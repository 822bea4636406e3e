"""Attention: block masks, both layouts and the block, compared with the dense definition in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from iceaggr.attention import (
    Block,
    PackedLayout,
    SegmentAttention,
    dense_attention,
    segment_block_mask,
    segment_mask_mod,
    single_tokens,
    token_count,
)
from iceaggr.engine.cpu_attention import GroupedLayout, pool_parts, run_parts
from iceaggr.pooling import AttentionPool, Segments

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile")

MIXED = torch.randint(1, 60, (80,), generator=torch.Generator().manual_seed(1)).tolist()
LENGTHS = [[1], [1, 1], [5], [3, 1, 3, 2], [17, 18, 20, 21, 1, 40, 30],
           [2] * 50 + [3] * 9 + [16] * 3 + [7] * 2, MIXED]


def random_packed(S, L, longest, seed=0, fill=0.9):
    "Segments (S, L) of random lengths, with padding at the end of each row."
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(S):
        lengths = torch.randint(1, longest + 1, (L,), generator=g)
        row = torch.repeat_interleave(torch.arange(L), lengths)[:int(L * fill)]
        rows.append(F.pad(row, (0, L - len(row)), value=-1))
    return torch.stack(rows)


def test_mask_of_twelve_tokens():
    "Each segment is a block, padding a block of its own: no row is empty, and the mask is symmetric."
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3, -1, -1, -1]])
    q, k = torch.meshgrid(torch.arange(15), torch.arange(15), indexing="ij")
    mask = segment_mask_mod(ids)(0, 0, q, k)
    assert mask.any(1).all() and torch.equal(mask, mask.T)
    assert mask.sum() == 4**2 + 1 + 2**2 + 5**2 + 3**2


@pytest.mark.parametrize("L, longest", [(512, 3), (512, 60), (512, 500), (640, 300), (128, 40), (1024, 1024)])
def test_block_mask_is_that_of_torch(L, longest):
    "The blocks from the ends of the segments are those that torch finds by evaluating the mask everywhere."
    ids = random_packed(3, L, longest, seed=L)
    ours = segment_block_mask(ids)
    theirs = create_block_mask(segment_mask_mod(ids), 3, None, L, L, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_single_tokens():
    "A token is single where both neighbours belong to other segments."
    ids = torch.tensor([[3, 3, 4, 5, 5, -1], [6, 7, 7, -1, -1, -1], [8, 8, 8, 8, 8, 9]])
    expected = [[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert single_tokens(ids).int().tolist() == expected


def test_token_count():
    "Numbers are rounded up to few values, by at most a quarter."
    assert [token_count(n) for n in (1, 128, 129, 1024, 1025, 5160)] == [128, 128, 256, 1024, 1280, 6144]
    assert [token_count(n, 8) for n in (1, 8, 9, 64, 65, 130)] == [8, 8, 16, 64, 80, 160]
    assert all(n <= token_count(n) <= max(1.25 * n, n + 127) for n in range(1, 20_000, 17))


@pytest.mark.parametrize("kernel", ["flex", "dense"])
@pytest.mark.parametrize("longest", [3, 60, 200])
def test_packed_attention_is_the_definition(kernel, longest):
    "Attention in packed sequences, padding included, is dense attention over all of their tokens."
    ids = random_packed(2, 256, longest)
    qkv = torch.randn(512, 48, dtype=torch.float64)
    expected = dense_attention(qkv, (ids + torch.tensor([[0], [1000]])).flatten(), 2)
    assert torch.allclose(PackedLayout(ids, kernel).attend(qkv, 2), expected, atol=1e-12)


@pytest.mark.parametrize("part_tokens", [1, 16, 100, 2048])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_grouped_attention_is_the_definition(lengths, part_tokens, H=2, C=8):
    "Attention over groups of similar length is dense attention, in one part and in many."
    lengths = torch.tensor(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    qkv = torch.randn(len(segment), 3 * C, dtype=torch.float64)
    layout = GroupedLayout(lengths, part_tokens)
    x, expected = layout.arrange(qkv), layout.arrange(dense_attention(qkv, segment, H))
    assert sum(part.segments.n for part in layout.parts) == len(lengths)
    assert layout.parts[-1].tokens.stop == len(segment)
    assert torch.equal(layout.restore_tokens(x), qkv)
    for part in layout.parts:
        found = x[part.tokens, 2 * C:] if part.single else part.attend(x[part.tokens], H)
        assert torch.allclose(found, expected[part.tokens], atol=1e-12)


def test_training_in_bfloat16_attends_in_float32():
    "Under autocast on a CPU the attention of a training step stays in float32, with its gradient."
    layout = GroupedLayout(torch.tensor([1, 1, 5, 5, 7, 60, 300]), 256)
    for part in layout.parts[1:]:
        n = part.tokens.stop - part.tokens.start
        qkv = torch.randn(n, 96, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16): found = part.attend(qkv, 2)
        exact = qkv.detach().float().requires_grad_()
        expected = part.attend(exact, 2)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected.to(torch.bfloat16))
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
        (expected * weight.float()).sum().backward()
        assert qkv.grad.dtype == torch.bfloat16
        assert torch.allclose(qkv.grad.float(), exact.grad, rtol=0.01, atol=0.01)


@pytest.fixture
def layer():
    "A block, a pooling, 60 segments of which half are single tokens, and their tokens, in float64."
    torch.manual_seed(0)
    lengths = torch.randint(1, 40, (60,))
    lengths[::2] = 1
    segment = torch.repeat_interleave(torch.arange(60), lengths)
    x = torch.randn(len(segment), 32, dtype=torch.float64, requires_grad=True)
    return Block(32, 2).double(), AttentionPool(32).double(), lengths, segment, x


def embed_grouped(block, pool, lengths, x):
    "The block and the pooling on the grouped layout, in several parts."
    layout = GroupedLayout(lengths, 100)
    assert len(layout.parts) > 2
    return pool_parts(lambda part: layout.arrange(x)[part.tokens], [block], pool, layout)


def embed_by_definition(block, pool, own):
    "One segment alone: attention written out, then softmax pooling written out."
    if len(own) > 1:
        qkv = block.attention.qkv(block.norm1(own))
        own = own + block.attention.out(dense_attention(qkv, torch.zeros(len(own)), 2))
        own = own + block.mlp(block.norm2(own))
    own = pool.norm(own)
    weight, value = pool.logits(own).softmax(0), pool.value(own).view(len(own), 4, 8)
    return torch.einsum("tq,tqc->qc", weight, value).flatten()


def test_block_on_both_layouts(layer):
    "Values and gradients on the grouped and on the packed layout agree, with each other and the definition."
    block, pool, lengths, segment, x = layer
    inputs = [x, *block.parameters(), *pool.parameters()]
    grouped = embed_grouped(block, pool, lengths, x)
    layout = PackedLayout(segment[None], "dense")
    packed = pool(layout.run_blocks([block], x), Segments(segment, 60))
    defined = torch.stack([embed_by_definition(block, pool, x[segment == n]) for n in range(60)])
    expected = torch.autograd.grad(defined.square().sum(), inputs)
    for found in (grouped, packed):
        assert torch.allclose(found, defined, atol=1e-12)
        for g, e in zip(torch.autograd.grad(found.square().sum(), inputs), expected, strict=True):
            assert torch.allclose(g, e, atol=1e-9 * max(1, e.abs().max()))


@torch.no_grad()
def test_segments_are_isolated(layer):
    "Changing the tokens of one segment leaves every other segment as it was, bit for bit."
    block, pool, lengths, segment, x = layer
    changed = x.clone()
    changed[segment == 7] *= -1
    before, after = (embed_grouped(block, pool, lengths, tokens) for tokens in (x, changed))
    others = torch.arange(60) != 7
    assert torch.equal(after[others], before[others]) and not torch.allclose(after[7], before[7])


@torch.no_grad()
def test_threads_change_nothing(layer):
    "Three threads give the numbers of one, and the number of threads is left as it was."
    block, pool, lengths, _, x = layer
    cores, found = torch.get_num_threads(), []
    try:
        for n in (1, 3, 3):
            torch.set_num_threads(n)
            found.append(embed_grouped(block, pool, lengths, x))
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(cores)
    assert torch.allclose(found[0], found[1], atol=1e-12) and torch.equal(found[1], found[2])


@torch.no_grad()
def test_tokens_come_back_in_order(layer):
    "Without blocks, what goes through the parts and is restored is what went in."
    _, _, lengths, _, x = layer
    layout = GroupedLayout(lengths, 100)
    parts = run_parts(lambda part: layout.arrange(x)[part.tokens], [], lambda x, part: x, layout)
    assert torch.equal(layout.restore_tokens(parts), x)


def test_wrong_settings_are_named():
    "A head size below 16 and an unknown kernel are errors."
    for d_model, n_heads in ((30, 4), (32, 4)):
        with pytest.raises(ValueError, match="head size"): SegmentAttention(d_model, n_heads)
    with pytest.raises(ValueError, match="kernel"): PackedLayout(torch.zeros(1, 4), "other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_attention_is_the_definition():
    "Compiled FlexAttention on a GPU, values and gradients, against float64."
    ids = random_packed(8, 512, 60).cuda()
    qkv = torch.randn(8 * 512, 3 * 128, device="cuda", requires_grad=True)
    unique = torch.where(ids >= 0, ids, 511) + torch.arange(8, device="cuda")[:, None] * 512
    found = PackedLayout(ids).attend(qkv, 8)
    expected = dense_attention(qkv.double(), unique.flatten(), 8)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    weight = torch.randn_like(expected)
    gradient, = torch.autograd.grad((found * weight.float()).sum(), qkv)
    reference, = torch.autograd.grad((expected * weight).sum(), qkv)
    assert (gradient - reference).norm() / reference.norm() < 1e-4
