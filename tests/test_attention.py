"""Attention inside segments: both layouts and the BlockMask against their definitions."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from definitions import assert_same_gradients, attention_pool_of, block_of, blocks_of, gradients
from torch.nn.attention.flex_attention import create_block_mask

from iceaggr.attention import (
    Block,
    PackedLayout,
    SegmentAttention,
    SquaredReLU,
    dense_attention,
    padded_block,
    segment_block_mask,
    segment_mask_mod,
    single_tokens,
    token_count,
)
from iceaggr.engine import cpu_attention
from iceaggr.engine.cpu_attention import GroupedLayout, map_parts, pool_parts, run_parts
from iceaggr.pooling import AttentionPool, Segments

# on small inputs, to compare with
UNCOMPILED = "ignore:(?s).*flex_attention called without torch.compile"
pytestmark = pytest.mark.filterwarnings(UNCOMPILED)

LENGTHS = {
    "one token": [1],
    "single tokens": [1, 1],
    "one segment": [5],
    "mixed and small": [3, 1, 3, 2],
    "padded groups": [17, 18, 20, 21, 1, 40, 30],
    "tiles with a rest": [2] * 50 + [3] * 9 + [16] * 3 + [7] * 2,
    "random": torch.randint(1, 60, (80,), generator=torch.Generator().manual_seed(1)).tolist(),
    "longer than a part": [300, 1, 2_100, 4, 290, 280],
}


def random_packed(S, L, longest, fill=0.9):
    "Segments of random lengths in S sequences of L tokens, with padding at the end."
    generator = torch.Generator().manual_seed(L + longest)
    rows = []
    for _ in range(S):
        lengths = torch.randint(1, longest + 1, (L,), generator=generator)
        row = torch.arange(L).repeat_interleave(lengths)[:int(L * fill)]
        rows.append(F.pad(row, (0, L - len(row)), value=-1))
    return torch.stack(rows)


def unique_ids(ids): # (S, L) local numbers -> (S * L,) numbers that no other sequence has
    "The segments of packed sequences as segments of one long sequence."
    return (ids + 10_000 * torch.arange(len(ids))[:, None]).flatten()


def random_tokens(n, width, requires_grad=False):
    "Tokens (n, width) in double precision."
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, width, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


# The mask, and what is counted


def test_mask_holds_each_segment_and_padding():
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3, -1, -1, -1]])
    query, key = torch.meshgrid(torch.arange(15), torch.arange(15), indexing="ij")
    mask = segment_mask_mod(ids)(0, 0, query, key)
    assert mask.any(1).all()
    assert torch.equal(mask, mask.T)
    assert mask.sum() == 4**2 + 1 + 2**2 + 5**2 + 3**2


@pytest.mark.parametrize("fill", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("L, longest", [
    (128, 1), (128, 40), (128, 128), (256, 7), (512, 3), (512, 60), (512, 500), (512, 512), (640, 300),
    (1024, 200), (1024, 1024), (300, 100), (100, 30)])
def test_block_mask_is_that_of_torch(L, longest, fill):
    "Empty, partial and full blocks, also where the sequence ends within a block."
    ids = random_packed(3, L, longest, fill)
    found = segment_block_mask(ids)
    expected = create_block_mask(segment_mask_mod(ids), 3, None, L, L, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)


def test_single_tokens():
    ids = torch.tensor([[3, 3, 4, 5, 5, -1], [6, 7, 7, -1, -1, -1], [8, 8, 8, 8, 8, 9]])
    expected = [[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert single_tokens(ids).int().tolist() == expected


def test_token_count():
    "At least n, few sizes, at most a quarter or one block more."
    assert [token_count(n) for n in (1, 128, 129, 1024, 1025, 5160)] == [128, 128, 256, 1024, 1280, 6144]
    assert [token_count(n, 8) for n in (1, 8, 9, 64, 65, 130)] == [8, 8, 16, 64, 80, 160]
    for n in range(1, 20_000, 17): assert n <= token_count(n) <= max(1.25 * n, n + 127)


# Layouts against the definition


@pytest.mark.parametrize("kernel", ["flex", "dense"])
@pytest.mark.parametrize("longest", [1, 7, 200])
def test_packed_layout_agrees_with_the_definition(longest, kernel):
    ids = random_packed(2, 256, longest)
    qkv = random_tokens(512, 48)
    expected = dense_attention(qkv, unique_ids(ids), n_heads=2)
    assert torch.allclose(PackedLayout(ids, kernel).attend(qkv, 2), expected, atol=1e-12)


@pytest.mark.parametrize("longest", [7, 200])
def test_packed_gradients_agree_with_the_definition(longest):
    ids = random_packed(2, 256, longest)
    qkv = random_tokens(512, 48, requires_grad=True)
    expected = gradients(dense_attention(qkv, unique_ids(ids), 2), [qkv])
    assert_same_gradients(gradients(PackedLayout(ids, "dense").attend(qkv, 2), [qkv]), expected, 1e-11)


def attend_grouped(layout, qkv, n_heads):
    "Attention part after part, in the order given; a single token gets its own value."
    x = layout.arrange(qkv)
    C = qkv.shape[1] // 3
    found = []
    for part in layout.parts:
        own = x[part.tokens]
        found.append(own[:, 2 * C:] if part.single else part.attend(own, n_heads))
    return layout.restore_tokens(torch.cat(found))


@pytest.mark.parametrize("part_tokens", [1, 16, 100, 2048])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_grouped_layout_agrees_with_the_definition(lengths, part_tokens):
    "Values and gradients, in one part and in many."
    lengths = torch.tensor(lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    layout = GroupedLayout(lengths, part_tokens)
    assert sum(part.segments.n for part in layout.parts) == len(lengths)
    assert layout.parts[-1].tokens.stop == len(segment)
    qkv = random_tokens(len(segment), 24, requires_grad=True)
    expected = dense_attention(qkv, segment, n_heads=2)
    found = attend_grouped(layout, qkv, n_heads=2)
    assert torch.allclose(found, expected, atol=1e-12)
    assert_same_gradients(gradients(found, [qkv]), gradients(expected, [qkv]), 1e-11)
    with torch.no_grad(): assert torch.allclose(attend_grouped(layout, qkv.detach(), 2), expected, atol=1e-12)


def test_parts_hold_at_most_their_tokens_and_single_tokens_apart():
    lengths = torch.tensor(LENGTHS["random"] + [1] * 30 + [150])
    layout = GroupedLayout(lengths, part_tokens=100)
    places = [part.tokens for part in layout.parts]
    assert places[0].start == 0
    for before, after in itertools.pairwise(places): assert before.stop == after.start
    for part in layout.parts:
        assert part.tokens.stop - part.tokens.start <= 100 or part.segments.n == 1
        assert (part.segments.lengths == 1).all() == part.single


def test_autocast_keeps_attention_in_float32():
    "In training with bfloat16 on a CPU the layers are in half precision, attention is not."
    layout = GroupedLayout(torch.tensor([1, 1, 5, 5, 7, 60, 300]), 256)
    for part in layout.parts[1:]:
        torch.manual_seed(0)
        qkv = torch.randn(part.tokens.stop - part.tokens.start, 96, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16): found = part.attend(qkv, 2)
        exact = qkv.detach().float().requires_grad_()
        expected = part.attend(exact, 2)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.to(torch.bfloat16))
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
        (expected * weight.float()).sum().backward()
        assert qkv.grad.dtype == torch.bfloat16
        assert torch.allclose(qkv.grad.float(), exact.grad, rtol=0.01, atol=0.01)


def test_attention_in_bfloat16_without_gradients():
    lengths = torch.tensor(LENGTHS["random"])
    layout = GroupedLayout(lengths, 500)
    qkv = random_tokens(int(lengths.sum()), 96)
    expected = attend_grouped(layout, qkv, 2)
    found = attend_grouped(layout, qkv.bfloat16(), 2)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() < 0.1


# Blocks


@pytest.fixture(scope="module")
def stack():
    "A block, a pooling, tokens (T, C) of 60 segments, and the segments' lengths."
    torch.manual_seed(0)
    block, pool = Block(32, n_heads=2).double(), AttentionPool(32).double()
    lengths = torch.randint(1, 40, (60,))
    lengths[::2] = 1
    x = torch.randn(int(lengths.sum()), 32, dtype=torch.float64, requires_grad=True)
    return block, pool, x, lengths


def embed_grouped(block, pool, x, lengths, part_tokens=100): # (N, C)
    layout = GroupedLayout(lengths, part_tokens)
    x = layout.arrange(x)
    return pool_parts(lambda part: x[part.tokens], [block], pool, layout)


def embed_packed(block, pool, x, lengths, kernel="dense"): # (N, C)
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    y = PackedLayout(ids[None], kernel).run_blocks([block], x)
    return pool(y, Segments(ids, len(lengths)))


def embed_by_definition(block, pool, x, lengths): # (N, C)
    own = x.split(lengths.tolist())
    return torch.stack([attention_pool_of(pool, blocks_of([block], tokens)) for tokens in own])


@pytest.mark.parametrize("embed", [embed_grouped, embed_packed])
def test_blocks_and_pooling_agree_with_the_definition(stack, embed):
    "Values and gradients."
    block, pool, x, lengths = stack
    inputs = [x, *block.parameters(), *pool.parameters()]
    expected, found = embed_by_definition(*stack), embed(*stack)
    assert torch.allclose(found, expected, atol=1e-12)
    assert_same_gradients(gradients(found, inputs), gradients(expected, inputs), 1e-9)


def test_blocks_with_flex_attention_agree_with_the_definition(stack):
    with torch.no_grad():
        assert torch.allclose(embed_packed(*stack, kernel="flex"), embed_by_definition(*stack), atol=1e-12)


def test_padded_block_is_the_block_of_each_row():
    torch.manual_seed(0)
    block, x = Block(32, n_heads=2).double(), random_tokens(3 * 20, 32).view(3, 20, 32)
    with torch.no_grad():
        found = padded_block(block, x, F.scaled_dot_product_attention)
        assert torch.allclose(found, torch.stack([block_of(block, row) for row in x]), atol=1e-12)


@pytest.mark.parametrize("embed", [embed_grouped, embed_packed])
def test_segments_are_isolated_bit_for_bit(stack, embed):
    block, pool, x, lengths = stack
    segment = torch.arange(60).repeat_interleave(lengths)
    others = torch.arange(60) != 7
    with torch.no_grad():
        changed = torch.where((segment == 7)[:, None], -x, x)
        before, after = embed(block, pool, x, lengths), embed(block, pool, changed, lengths)
    assert torch.equal(after[others], before[others])
    assert not torch.allclose(after[7], before[7])


def test_blocks_do_not_change_their_input(stack):
    block, pool, x, lengths = stack
    before = x.detach().clone()
    with torch.no_grad(): embed_grouped(*stack)
    assert torch.equal(x, before)


def test_squared_relu():
    x = torch.tensor([-2.0, 0, 3])
    assert SquaredReLU()(x.clone()).tolist() == [0, 0, 9]
    x = x.requires_grad_()
    SquaredReLU()(x * 1).sum().backward()
    assert x.grad.tolist() == [0, 0, 6]


@pytest.mark.parametrize("d_model, n_heads", [(30, 4), (32, 4), (33, 2)])
def test_heads_must_fit(d_model, n_heads):
    with pytest.raises(ValueError, match="head size of 16 or more"): SegmentAttention(d_model, n_heads)


def test_unknown_kernel_of_a_packed_layout():
    with pytest.raises(ValueError, match='kernel must be "flex" or "dense"; got \'grouped\''):
        PackedLayout(torch.zeros(1, 128, dtype=torch.int64), "grouped")


# Threads


@pytest.fixture
def set_threads():
    "Sets torch's number of threads, and puts it back at the end."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_requested():
    "How often the pool of threads was asked for."
    info = cpu_attention._one_core_threads.cache_info()
    return info.hits + info.misses


def in_one_and_three_threads(set_threads, function):
    "Results without gradients, of which only the second is worked out in threads."
    requested, found = threads_requested(), []
    for n in (1, 3):
        set_threads(n)
        with torch.no_grad(): found.append(function())
        assert torch.get_num_threads() == n
    assert threads_requested() == requested + 1
    return found


def test_threads_give_the_result_of_one_thread(stack, set_threads):
    one, three = in_one_and_three_threads(set_threads, lambda: embed_grouped(*stack))
    assert torch.allclose(one, three, atol=1e-12)
    assert torch.allclose(three, embed_by_definition(*stack), atol=1e-12)


def test_threads_take_over_autocast(stack, set_threads):
    block, pool, x, lengths = stack
    block, pool, x = copy.deepcopy(block).float(), copy.deepcopy(pool).float(), x.detach().float()

    def embed():
        with torch.autocast("cpu", torch.bfloat16): return embed_grouped(block, pool, x, lengths)

    one, three = in_one_and_three_threads(set_threads, embed)
    with torch.no_grad(): precise = embed_grouped(block, pool, x, lengths)
    assert (one - three).abs().max() < 0.1 * (one - precise).abs().max()


def test_threads_take_over_inference_mode(set_threads):
    set_threads(2)
    parts = GroupedLayout(torch.tensor([600, 600]), 600).parts
    with torch.inference_mode():
        assert map_parts(lambda part: torch.is_inference_mode_enabled(), parts) == [True, True]
    with torch.no_grad():
        assert map_parts(lambda part: torch.is_inference_mode_enabled(), parts) == [False, False]
        assert map_parts(lambda part: torch.is_grad_enabled(), parts) == [False, False]
        assert map_parts(lambda part: torch.get_num_threads(), parts) == [1, 1]


def test_results_of_parts_keep_their_order(set_threads):
    set_threads(3)
    parts = GroupedLayout(torch.tensor([300] * 7), 300).parts
    with torch.no_grad(): starts = map_parts(lambda part: part.tokens.start, parts)
    assert starts == [300 * n for n in range(7)]


def test_an_error_in_a_thread_is_raised_and_the_number_of_threads_stays(set_threads):
    set_threads(2)
    parts = GroupedLayout(torch.tensor([600, 600]), 600).parts
    with torch.no_grad(), pytest.raises(ZeroDivisionError): map_parts(lambda part: 1 / 0, parts)
    assert torch.get_num_threads() == 2


def test_no_threads_with_dropout(set_threads):
    "The random numbers of a seed stay the same, whatever the number of cores."
    torch.manual_seed(0)
    block, x = Block(32, n_heads=2, dropout=0.5), torch.randn(900, 32)
    layout, found = GroupedLayout(torch.tensor([300] * 3), 300), []
    for n in (1, 3):
        set_threads(n)
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(run_parts(lambda part: x[part.tokens], [block], lambda y, part: y, layout))
    assert torch.equal(found[0], found[1])
