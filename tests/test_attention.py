"""Every form of the packed attention is the dense mask, whole and at each step of a rollout."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from nanoqstar import attention
from nanoqstar.attention import Flex, TwoPart, dense, few_queries, packed_attention, text_mask
from nanoqstar.thoughts import Packing, dense_mask, query_rows

PIECE = 16  # positions, in the test of pieces
PACKINGS = [Packing(n_text=T + A - 1, n_positions=T, n_passes=P, n_branch=n) for T, A, P, n in [
    (1, 1, 1, 1), (5, 3, 2, 4), (PIECE - 1, 1, 1, 2), (PIECE, 2, 2, 3), (PIECE + 1, 4, 3, 1),
    (2 * PIECE + 5, 2, 2, 3)]]
EVERY_OFFSET = [(packing, offset) for packing in PACKINGS
               for offset in [None, *range(packing.n_branch + 1)]]
TILED = [Packing(n_text=T + 1, n_positions=T, n_passes=P, n_branch=n)
         for T, P, n in [(200, 1, 4), (60, 3, 7)]]


def name(value):
    if isinstance(value, Packing):
        return f"T{value.n_positions}-P{value.n_passes}-branch{value.n_branch}"
    return "whole" if value is None else f"offset{value}"


def random_qkv(packing, offset, kv_heads=2, groups=3, dim=8, dtype=torch.float64, device="cpu",
               batch=2):
    n = len(query_rows(packing.describe()[2], offset))
    gen = torch.Generator().manual_seed(0)
    shapes = ((kv_heads * groups, n), (kv_heads, packing.n_packed), (kv_heads, packing.n_packed))
    return [torch.randn(batch, *shape, dim, generator=gen).to(device, dtype).requires_grad_()
            for shape in shapes]


def random_docs(packing, batch=2):
    """Row 0 is one document; the others break at offsets of their own."""
    gen = torch.Generator().manual_seed(1)
    breaks = torch.rand(batch, packing.n_text + 1, generator=gen) < 0.2
    return (breaks * (torch.arange(batch) > 0)[:, None]).cumsum(1)


def mask_of(packing, docs, offset):
    return dense_mask(packing, docs)[:, :, query_rows(packing.describe(docs.device)[2], offset)]


def assert_same(ours, reference, qkv, tolerance, gradients=True):
    """Outputs, and gradients of q, k, v for one cotangent: `tolerance` of their largest apart."""
    pairs = [(ours, reference)]
    if gradients:
        cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours)
        pairs += zip(*(torch.autograd.grad(x, qkv, cotangent.to(x)) for x in (ours, reference)),
                     strict=True)
    for a, b in pairs:
        assert a.shape == b.shape and (
            (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


def at(attend, offset):
    return attend if offset is None else attend.at(offset)


@pytest.mark.parametrize("size", ["default", PIECE, 1])
@pytest.mark.parametrize(("packing", "offset"), EVERY_OFFSET, ids=name)
def test_two_part_is_dense(monkeypatch, packing, offset, size):
    docs, qkv = random_docs(packing), random_qkv(packing, offset)
    if size != "default":
        pieces = TwoPart.pieces
        monkeypatch.setattr(TwoPart, "pieces", lambda self, _: pieces(self, size))
    expected = dense(mask_of(packing, docs, offset))(*qkv)
    assert_same(at(TwoPart(packing, docs), offset)(*qkv), expected, qkv, 1e-13)


def test_a_piece_holds_the_scores_it_should(monkeypatch):
    packing, scores = PACKINGS[-1], []
    monkeypatch.setattr(attention, "SCORES_PER_PIECE", 10_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax",
                        lambda x, *args, **kw: scores.append(x.numel()) or softmax(x, *args, **kw))
    TwoPart(packing, random_docs(packing))(*random_qkv(packing, None))
    assert len(scores) > 4 and 10_000 < max(scores[1:]) <= 20_000  # the text is one piece


def test_a_rollout_ignores_what_its_slots_held():
    """At offset 1, whatever lies in the slots of later offsets and other passes changes nothing."""
    packing = PACKINGS[1]
    docs, (q, k, v) = random_docs(packing), random_qkv(packing, 1)
    later = packing.describe()[2] > 1
    garbage = [torch.where(later[:, None], 1e3, x) for x in (k, v)]
    attend = TwoPart(packing, docs).at(1)
    assert torch.equal(attend(q, k, v), attend(q, *garbage))


def test_two_part_keeps_the_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        qkv = random_qkv(PACKINGS[1], None, dtype=dtype)
        assert TwoPart(PACKINGS[1], random_docs(PACKINGS[1]))(*qkv).dtype == dtype


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_queries_is_dense(n):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 8, generator=gen, dtype=torch.float64,
                           requires_grad=True)
               for heads, length in ((6, n), (2, 9), (2, 9)))
    mask = (torch.rand(3, 1, n, 9, generator=gen) < 0.5) | (torch.arange(9) == 4)
    assert_same(few_queries(mask)(q, k, v), dense(mask)(q, k, v), (q, k, v), 1e-13)


def test_the_cpu_gets_two_parts():
    assert isinstance(packed_attention(PACKINGS[1], random_docs(PACKINGS[1])), TwoPart)


def test_text_mask_by_hand():
    assert text_mask(torch.tensor([[0, 0, 0], [3, 4, 4]])).int().tolist() == [
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]], [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]


def make_flex(packing, docs, offset, device="cpu"):
    return at(Flex(packing, docs.to(device)), offset)


@pytest.mark.parametrize("offset", [None, 0, 1, 2], ids=name)
@pytest.mark.parametrize("packing", [*PACKINGS[1:3], *TILED], ids=name)
def test_flex_mask_is_the_dense_mask(packing, offset):
    """Padded keys are seen by nobody, padded queries see one key, so that no softmax is empty."""
    docs = random_docs(packing)
    flex, expected = make_flex(packing, docs, offset), mask_of(packing, docs, offset)
    n_queries, n_keys = expected.shape[2:]
    lengths = [-(-n // 128) * 128 for n in (n_queries, n_keys)]
    mask = create_mask(flex.block_mask.mask_mod, 2, 1, *lengths, device="cpu")
    assert torch.equal(mask[:, :, :n_queries, :n_keys], expected)
    assert not mask[..., n_keys:].any() and (mask[:, :, n_queries:].sum(-1) == 1).all()


@pytest.mark.parametrize("offset", [None, 0, 1, 4], ids=name)
@pytest.mark.parametrize("packing", TILED, ids=name)
def test_tile_table_is_a_superset(packing, offset):
    """No visible pair lies outside the tiles; of the whole sequence's tiles most are left out."""
    one_document = torch.zeros(1, packing.n_text, dtype=torch.long)
    block_mask = make_flex(packing, one_document, offset).block_mask
    table = tiles(block_mask.kv_num_blocks, block_mask.kv_indices)
    mask = mask_of(packing, one_document, offset)[0, 0]
    mask = F.pad(mask, (0, -mask.shape[1] % 128, 0, -mask.shape[0] % 128))
    needed = mask.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert not (needed & ~table).any()
    assert offset is not None or table.sum() < 0.6 * table.numel()
    # the backward pass reads columns
    assert torch.equal(tiles(block_mask.q_num_blocks, block_mask.q_indices), table.T)


def tiles(counts, indices):
    table = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count, index in zip(table, counts[0, 0], indices[0, 0], strict=True):
        row[index[:count].long()] = True
    return table


def test_tile_table_by_hand():
    """Tiles of 2: text 0 1 | text 2 3 | group 0 | group 1 | groups 2, 3 | padding; groups query."""
    far = 2**30
    position = torch.tensor([[0, 1], [2, 3], [0, 0], [1, 1], [2, 3], [0, 0]])
    offset = torch.tensor([[-1, -1], [-1, -1], [0, 1], [0, 1], [0, 0], [far, far]])
    counts, indices = attention.tile_table(position[2:5], offset[2:5], position, offset)
    seen = [sorted(row[:n].tolist()) for row, n in zip(indices, counts, strict=True)]
    assert seen == [[0, 2], [0, 3], [0, 1, 4]]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("offset", [None, 0, 1, 4], ids=name)
def test_flex_is_dense_on_the_cpu(monkeypatch, offset):
    """The mask, the padding and the cut, in eager mode; FlexAttention has no backward here."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    for packing in (PACKINGS[1], PACKINGS[5] if offset != 4 else PACKINGS[1]):
        docs, qkv = random_docs(packing), random_qkv(packing, offset, dim=16, dtype=torch.float32)
        with torch.no_grad():
            ours = make_flex(packing, docs, offset)(*qkv)
            reference = dense(mask_of(packing, docs, offset))(*qkv)
        assert_same(ours, reference, qkv, 2e-6, gradients=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_one_flex_serves_every_batch_of_its_shape(monkeypatch):
    """Tiles are shared, documents are each instance's own: two forwards of one shape may be alive
    at once, as they are where a backward pass recomputes the first after the second has run."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    packing = PACKINGS[1]
    qkv = random_qkv(packing, None, dim=16, dtype=torch.float32)
    documents = (random_docs(packing), torch.arange(packing.n_text + 1).expand(2, -1))
    forms = [Flex(packing, docs) for docs in documents]
    assert forms[0].tiles is forms[1].tiles
    for flex, docs in zip(forms, documents, strict=True):
        with torch.no_grad():
            expected = dense(mask_of(packing, docs, None))(*qkv)
            assert_same(flex(*qkv), expected, qkv, 2e-6, gradients=False)


def test_documents_of_a_batch_compile_nothing(monkeypatch):
    """A mask for every batch, one graph for all of them; and its steps know its documents."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flex_attention, backend="eager", dynamic=False)
    monkeypatch.setattr(attention, "compiled_flex", lambda: compiled)
    packing, first = PACKINGS[1], 0
    for seed in range(3):
        docs = random_docs(packing) if seed else torch.arange(packing.n_text + 1).expand(2, -1)
        for offset in (None, 0, 1):
            qkv = random_qkv(packing, offset, dim=16, dtype=torch.float32)
            with torch.no_grad():
                assert_same(at(Flex(packing, docs), offset)(*qkv),
                            dense(mask_of(packing, docs, offset))(*qkv), qkv, 2e-6, gradients=False)
        first = first if seed else counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first > 0


def test_a_forward_in_inference_mode_spoils_nothing():
    """What is kept by shape is made of ordinary tensors, which a later backward pass may save."""
    packing = Packing(7, 5, 2, 3)  # a shape that no other test uses
    docs = torch.zeros(1, 8, dtype=torch.long)
    with torch.inference_mode():
        Flex(packing, docs), TwoPart(packing, docs).at(1)
        tensors = [*packing.describe(), packing.rope_positions(), packing.rows(1)]
        tensors += Flex(packing, docs).tiles.ranges
    assert not any(x.is_inference() for x in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)],
                         ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [None, 0, 2], ids=name)
@pytest.mark.parametrize("packing", TILED, ids=name)
def test_flex_is_dense_on_cuda(packing, offset, dtype, tolerance):
    """The compiled kernel, forward and backward, against fp32's dense mask, at Qwen2.5's groups."""
    docs = random_docs(packing).cuda()
    qkv = random_qkv(packing, offset, groups=7, dim=64, dtype=dtype, device="cuda")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        wide = [x.detach().float().requires_grad_() for x in qkv]
        attend = at(packed_attention(packing, docs), offset)
        assert isinstance(attend, Flex)
        ours, reference = attend(*qkv), dense(mask_of(packing, docs, offset))(*wide)
        cotangent = torch.randn(ours.shape, device="cuda").to(dtype)
        pairs = [(ours, reference), *zip(
            torch.autograd.grad(ours, qkv, cotangent),
            torch.autograd.grad(reference, wide, cotangent.float()), strict=True)]
        for a, b in pairs:
            assert (a.float() - b).abs().max() <= tolerance * b.abs().max()
    finally:
        torch.set_float32_matmul_precision(precision)
