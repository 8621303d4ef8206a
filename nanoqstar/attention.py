"""Who attends to whom, as callables (q (B, H, N, d), k and v (B, G, M, d)) -> (B, H, N, d).

Packed text and thoughts have three forms with one meaning (`thoughts.visible`), tested against each
other: `dense` (the definition, small and slow), `TwoPart` (CPU, MPS: no quadratic mask) and `Flex`
(CUDA).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanoqstar.device import can_compile, compiled
from nanoqstar.thoughts import Packing, query_rows, visible

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# of TwoPart, a thread: a piece's scores stay in the cache, its text keys end where its positions do
SCORES_PER_PIECE = 2**19


def dense(mask: torch.Tensor | None) -> Attend:
    """Attention under a boolean mask (B or 1, 1, N, M), True = visible; None: causal, N == M."""
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.is_cuda:  # where no fast kernel takes both a mask and grouped keys
            k, v = repeat_heads(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return attend


def repeat_heads(q: torch.Tensor, *grouped: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values (B, G, M, d) repeated for each query head of their group."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in grouped]


def few_queries(mask: torch.Tensor) -> Attend:
    """`dense` for a step of decoding, which is launching kernels: three, and no key repeated."""
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, N, d)
        scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])
        scores = scores * k.shape[-1]**-0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        p = scores.masked_fill(~mask[:, :, None], -math.inf).softmax(-1).to(v.dtype)
        return (p.flatten(2, 3) @ v).view(q.shape)
    return attend


def text_mask(docs: torch.Tensor) -> torch.Tensor:
    """Causal and within one document: docs (B, N) -> (B, 1, N, N) bool."""
    n = docs.shape[1]
    same = docs[:, None, :, None] == docs[:, None, None, :]
    return same & torch.ones(n, n, dtype=torch.bool, device=docs.device).tril()


def minus_infinity_where(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)


class TwoPart:
    """Queries against the text's keys and against their own group's keys, in one softmax.

    The cost beyond what is visible is half a piece of text keys and the other passes of the own
    group; nothing of size [packed, packed] exists and grouped keys are never repeated.
    """

    def __init__(self, packing: Packing, docs: torch.Tensor) -> None:
        self.packing, self.offset = packing, None
        self.scores = torch.get_num_threads() * SCORES_PER_PIECE  # of a piece, on all threads
        # (B, 1, n_text, n_text)
        self.text_bias = minus_infinity_where(~text_mask(docs[:, :packing.n_text]))
        self.own_bias = self.own_bias_at(None, docs.device)

    def own_bias_at(self, offset: int | None, device: torch.device) -> torch.Tensor:
        """(n, m): the group's tokens that are queries, the group's keys."""
        packing = self.packing
        _, pass_, offsets = (x[packing.n_text:][:packing.n_group] for x in packing.describe(device))
        # one position, one document
        rows, same = query_rows(offsets, offset), torch.zeros_like(offsets)
        queries = tuple(x[rows, None] for x in (same, pass_, offsets, same))
        return minus_infinity_where(~visible(queries, (same, pass_, offsets, same)))

    def at(self, offset: int) -> "TwoPart":
        """The same for the queries of one offset alone (0: text and roots), against all keys."""
        step: Any = copy.copy(self)
        step.own_bias, step.offset = self.own_bias_at(offset, self.own_bias.device), offset
        return step

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, m = self.own_bias.shape  # queries and keys of a position
        scores = q.shape[0] * q.shape[1] * n * (self.packing.n_text + m)
        pieces = self.pieces(max(1, self.scores // scores))
        return _InPieces.apply(q, k, v, pieces, self.packing.n_text)

    def pieces(self, size: int) -> list["Piece"]:
        """The text, if it has queries, and the groups of `size` positions at a time."""
        n_text, (n, m), made = self.packing.n_text, self.own_bias.shape, []
        first = 0 if self.offset else n_text  # queries that are text
        if first:
            made.append(Piece(slice(n_text), 1, n_text, slice(0),
                              self.text_bias[:, :, None, :, None], self.own_bias[:1, :0]))
        for start in range(0, self.packing.n_positions, size):
            stop = min(start + size, self.packing.n_positions)
            made.append(Piece(
                slice(first + start * n, first + stop * n), stop - start, stop,
                slice(n_text + start * m, n_text + stop * m),
                self.text_bias[:, :, start:stop, None, None, :stop], self.own_bias))
        return made


@dataclass(frozen=True)
class Piece:
    """Queries in groups of equal size, and what they see; its scores fit into a core's cache."""

    rows: slice  # of the queries
    n_groups: int
    n_text: int  # the first keys of the text
    own: slice  # keys of the groups
    text_bias: torch.Tensor  # (B, 1, n_groups or 1, queries of a group or 1, 1, n_text)
    own_bias: torch.Tensor  # (queries of a group, keys of a group)

    def of(self, x: torch.Tensor, rows: slice, kv_heads: int) -> torch.Tensor:
        """Rows of x (B, heads, N, d) as a view (B, G, n_groups, rows of a group, heads / G, d)."""
        x = x[:, :, rows].unflatten(1, (kv_heads, -1))
        groups = (self.n_groups, x.shape[3] // self.n_groups)
        return x.unflatten(3, groups).permute(0, 1, 3, 4, 2, 5)

    def queries(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """(B * G, n_groups, n, d) of x (B, H, N, d); n: a group's queries, of each head of G."""
        return self.of(x, self.rows, kv_heads).flatten(3, 4).flatten(0, 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(B * G * n_groups, m, d) of x (B, G, M, d)."""
        return self.of(x, self.own, x.shape[1]).flatten(3, 4).flatten(0, 2)


class _InPieces(torch.autograd.Function):
    """Attention, forward and backward, a piece after the other."""

    @staticmethod
    def forward(ctx, q, k, v, pieces, n_text):  # type: ignore[no-untyped-def]
        kv_heads, out, probs = k.shape[1], torch.empty_like(q), []
        k = k * k.shape[-1]**-0.5  # there are fewer keys than queries
        k_text, v_text = (x[:, :, :n_text].flatten(0, 1) for x in (k, v))
        for piece in pieces:
            rows, k_own, v_own = piece.queries(q, kv_heads), piece.keys(k), piece.keys(v)
            seen, target = piece.n_text, piece.of(out, piece.rows, kv_heads)
            scores = torch.cat((
                torch.bmm(rows.flatten(1, 2), k_text[:, :seen].mT).view(*rows.shape[:3], -1),
                torch.bmm(rows.flatten(0, 1), k_own.mT).view(*rows.shape[:3], -1)), dim=-1)
            by_head = scores.view(*target.shape[:5], -1)
            by_head[..., :seen] += piece.text_bias
            by_head[..., seen:] += piece.own_bias[:, None]
            dtype = torch.promote_types(q.dtype, torch.float32)
            p = scores.softmax(-1, dtype=dtype).to(v.dtype)
            o = torch.bmm(p[..., :seen].flatten(1, 2), v_text[:, :seen]).view(rows.shape)
            o.flatten(0, 1).baddbmm_(p[..., seen:].flatten(0, 1), v_own)
            target.copy_(o.view(target.shape))
            probs.append(p)
        ctx.pieces, ctx.n_text = pieces, n_text
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, *probs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, *probs = ctx.saved_tensors
        kv_heads, (grad_q, grad_k, grad_v) = k.shape[1], (torch.zeros_like(x) for x in (q, k, v))
        k_text, v_text = (x[:, :, :ctx.n_text].flatten(0, 1) for x in (k, v))
        sums = torch.zeros_like(k_text), torch.zeros_like(v_text)
        for piece, p in zip(ctx.pieces, probs, strict=True):
            rows, g = piece.queries(q, kv_heads), piece.queries(grad, kv_heads)
            seen, k_own, v_own = piece.n_text, piece.keys(k), piece.keys(v)
            text_p, own_p = p[..., :seen].flatten(1, 2), p[..., seen:].flatten(0, 1)
            grad_p = torch.cat((
                torch.bmm(g.flatten(1, 2), v_text[:, :seen].mT).view(*p.shape[:3], -1),
                torch.bmm(g.flatten(0, 1), v_own.mT).view(*p.shape[:3], -1)), dim=-1)
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            text_s, own_s = grad_s[..., :seen].flatten(1, 2), grad_s[..., seen:].flatten(0, 1)
            grad_rows = torch.bmm(text_s, k_text[:, :seen]).view(rows.shape)
            grad_rows.flatten(0, 1).baddbmm_(own_s, k_own)
            for total, weights, own, x, out in (
                    (sums[0], text_s, own_s, rows, grad_k), (sums[1], text_p, own_p, g, grad_v)):
                total[:, :seen] += torch.bmm(weights.mT, x.flatten(1, 2))
                to = piece.of(out, piece.own, kv_heads)
                to.copy_(torch.bmm(own.mT, x.flatten(0, 1)).view(to.shape))
            to = piece.of(grad_q, piece.rows, kv_heads)
            to.copy_(grad_rows.view(to.shape))
        for out, total in zip((grad_k, grad_v), sums, strict=True):
            out[:, :, :ctx.n_text] = total.view_as(out[:, :, :ctx.n_text])
        return grad_q, grad_k * k.shape[-1]**-0.5, grad_v, None, None


class Flex:
    """flex_attention (CUDA) over tiles: text up to a tile's last position, and its groups' tiles.

    The tiles depend on the packing alone (`FlexTiles`) and documents are a tensor that the mask
    reads, so one compiled kernel serves every batch of a shape. Each instance holds the documents
    of its own batch: a forward that is recomputed in a backward pass sees what it saw.
    """

    def __init__(self, packing: Packing, docs: torch.Tensor, offset: int | None = None,
                 starts: torch.Tensor | None = None) -> None:
        self.packing, self.docs = packing, docs
        self.starts = document_starts(docs[:, :packing.n_text]) if starts is None else starts
        self.tiles = tiles_for_shape(packing, offset, docs.device)
        self.block_mask = self.tiles.block_mask(self.starts)

    def at(self, offset: int) -> "Flex":
        """The same for the queries of one offset alone (0: text and roots), against all keys."""
        return Flex(self.packing, self.docs, offset, self.starts)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            # the backward kernel takes a key tile for all heads of its group in one loop: the first
            # tiles, which nearly all queries see, would keep everything waiting
            k, v = repeat_heads(q, k, v)
        n_queries, (pad_q, pad_k) = q.shape[2], self.tiles.pads
        q, k, v = (F.pad(x, (0, 0, 0, pad))
                   for x, pad in zip((q, k, v), (pad_q, pad_k, pad_k), strict=True))
        out = compiled_flex()(q, k, v, block_mask=self.block_mask, enable_gqa=True)
        return out[:, :, :n_queries]


def document_starts(docs: torch.Tensor) -> torch.Tensor:
    """Where each position's document begins, (B, N) int32; a document is one run of positions."""
    index = torch.arange(docs.shape[1], device=docs.device)
    first = F.pad(torch.where(docs[:, 1:] != docs[:, :-1], index[1:], 0), (1, 0))
    return first.cummax(1).values.int()


class FlexTiles:
    """What `Flex` needs of a packing's shape: the tile table, and each query's visible ranges.

    A query's visible keys are two ranges and its root, so the mask inside a tile looks nothing up
    by key. Lengths are padded to whole tiles: a padded query sees the first text token, a padded
    key is seen by none.
    """

    TILE = 128

    @torch.inference_mode(False)
    def __init__(self, packing: Packing, offset: int | None, device: torch.device) -> None:
        described, rows = packing.describe(), packing.rows(offset)
        position, _, offsets = described
        index = torch.arange(packing.n_packed)
        # a text token is its own root
        root = torch.where(offsets < 0, index, packing.n_text + position * packing.n_group)
        # text up to; own branch from, to; root
        ranges = (position, index - (offsets - 1).clamp(min=0), index, root)
        self.pads = [-len(x) % self.TILE for x in (rows, index)]
        query = [F.pad(x[rows], (0, self.pads[0]), value=fill)
                 for x, fill in zip(described, (0, -1, -1), strict=True)]
        key = [F.pad(x, (0, self.pads[1]), value=fill)
               for x, fill in zip(described, (0, -1, 2**30), strict=True)]
        counts, indices = tile_table(*(x.view(-1, self.TILE)
                                       for x in (query[0], query[2], key[0], key[2])))
        self.ranges = [F.pad(x[rows], (0, self.pads[0])).int().to(device) for x in ranges]
        self.table = BlockMask.from_kv_blocks(
            counts[None, None].to(device), indices[None, None].to(device), BLOCK_SIZE=self.TILE,
            seq_lengths=(len(query[0]), len(key[0])))

    def block_mask(self, starts: torch.Tensor) -> BlockMask:
        """For documents that start there, (B, n_text)."""
        position, first, last, root = self.ranges

        def mask(b, h, q, k):  # type: ignore[no-untyped-def]
            text = (starts[b, position[q]] <= k) & (k <= position[q])
            return text | ((first[q] <= k) & (k <= last[q])) | (k == root[q])

        block_mask = copy.copy(self.table)
        block_mask.mask_mod = mask
        return block_mask


def tile_table(q_position: torch.Tensor, q_offset: torch.Tensor, k_position: torch.Tensor,
               k_offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key tiles each query tile may see: counts (Q tiles,) and indices (Q tiles, K tiles).

    Arguments are (tiles, 128). By their ranges, a superset of what is visible: the mask decides
    inside a tile.
    """
    is_text, is_own = k_offset < 0, (k_offset >= 0) & (k_offset < 2**30)
    far = 2**30
    first_text = torch.where(is_text, k_position, far).amin(1)
    first_own = torch.where(is_own, k_position, far).amin(1)
    last_own = torch.where(is_own, k_position, -far).amax(1)
    # text and padding have no group
    high, thinks = q_position.amax(1, keepdim=True), q_offset >= 0
    first, last = (torch.where(thinks, q_position, fill) for fill in (far, -far))
    first, last = first.amin(1, keepdim=True), last.amax(1, keepdim=True)
    seen = (first_text <= high) | ((first_own <= last) & (last_own >= first))
    return seen.sum(1).int(), seen.int().argsort(dim=1, descending=True, stable=True).int()


@lru_cache
def compiled_flex() -> Any:
    return compiled(flex_attention, dynamic=False)


tiles_for_shape = lru_cache(maxsize=64)(FlexTiles)


def packed_attention(packing: Packing, docs: torch.Tensor) -> TwoPart | Flex:
    """The form of the packed attention that suits the device; docs (B, >= n_text) document ids.

    As it is for the whole packed sequence; its `at(offset)` for a step of a rollout.
    """
    form = Flex if docs.is_cuda and can_compile(docs.device) else TwoPart
    return form(packing, docs)
