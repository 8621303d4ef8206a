"""Who attends to whom, as callables (q (B, H, N, d), k and v (B, G, M, d)) -> (B, H, N, d).

Packed text and thoughts have three forms with one meaning (`thoughts.visible`), tested against each other:
`dense` (the definition, small and slow), `TwoPart` (CPU, MPS: no quadratic mask) and `Flex` (CUDA).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanoqstar.device import can_compile, compiled
from nanoqstar.thoughts import query_rows, visible

POSITIONS_PER_CHUNK = 16  # of TwoPart: a chunk's scores stay in cache, its text keys end where its positions do


def dense(mask):
    """Attention under a boolean mask (B or 1, 1, N, M), True = visible; None: causal over equal q and k lengths."""
    def attend(q, k, v):
        if q.is_cuda:  # where no fast kernel takes both a mask and grouped keys
            k, v = repeat_heads(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return attend


def repeat_heads(q, *grouped):
    """Keys and values (B, G, M, d) repeated for each query head of their group."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in grouped]


def few_queries(mask):
    """`dense` for a step of decoding, whose time is that of launching kernels: three of them, and no key repeated."""
    def attend(q, k, v):
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, N, d)
        scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, grouped.shape[2:4]) * k.shape[-1]**-0.5
        dtype = torch.promote_types(scores.dtype, torch.float32)
        p = scores.to(dtype).masked_fill(~mask[:, :, None], -math.inf).softmax(-1).to(v.dtype)
        return (p.flatten(2, 3) @ v).view(q.shape)
    return attend


def text_mask(docs):
    """Causal and within one document: docs (B, N) -> (B, 1, N, N) bool."""
    n = docs.shape[1]
    same = docs[:, None, :, None] == docs[:, None, None, :]
    return same & torch.ones(n, n, dtype=torch.bool, device=docs.device).tril()


def minus_infinity_where(mask):
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)


class TwoPart:
    """Queries against the text's keys and against their own group's keys, in one softmax.

    The cost beyond what is visible is half a chunk of text keys and the other passes of the own group; nothing of
    size [packed, packed] exists and grouped keys are never repeated.
    """

    def __init__(self, packing, docs, place=None):
        self.packing = packing
        _, pass_, places = (x[packing.n_text:][:packing.n_group] for x in packing.describe(docs.device))
        rows, same = query_rows(places, place), torch.zeros_like(places)  # one group: one position, one document
        own = visible(tuple(x[rows, None] for x in (same, pass_, places, same)), (same, pass_, places, same))
        seen = text_mask(docs[:, :packing.n_text])
        self.text = dense(seen)
        self.has_text = place is None or place == 0
        self.text_bias = minus_infinity_where(~seen[:, :, :packing.n_positions])  # (B, 1, T, n_text)
        self.own_bias = minus_infinity_where(~own)  # (n, m): the group's tokens in q, the group's keys

    def __call__(self, q, k, v):
        n_text = self.packing.n_text
        (k_text, k_own), (v_text, v_own) = (x.split((n_text, x.shape[2] - n_text), dim=2) for x in (k, v))
        if not self.has_text:
            return self.groups(q, k_text, v_text, k_own, v_own)
        q_text, q_own = q.split((n_text, q.shape[2] - n_text), dim=2)
        return torch.cat((self.text(q_text, k_text, v_text), self.groups(q_own, k_text, v_text, k_own, v_own)), dim=2)

    def groups(self, q, k_text, v_text, k_own, v_own):
        batch, kv_heads, _, d = k_text.shape
        positions, (n, m) = self.packing.n_positions, self.own_bias.shape
        q = q.unflatten(1, (kv_heads, -1)).unflatten(3, (positions, n))  # (B, G, R, T, n, d)
        k_text, k_own = k_text * d**-0.5, k_own * d**-0.5  # there are fewer keys than queries
        k_own, v_own = (x.unflatten(2, (positions, m)) for x in (k_own, v_own))  # (B, G, T, m, d)
        outs = []
        for start in range(0, positions, POSITIONS_PER_CHUNK):
            stop = min(start + POSITIONS_PER_CHUNK, positions)
            qc, kc, vc = q[:, :, :, start:stop], k_own[:, :, start:stop], v_own[:, :, start:stop]
            shape = qc.shape[:-1]  # (B, G, R, t, n)
            text = (qc.flatten(2, 4) @ k_text[:, :, :stop].transpose(-1, -2)).view(*shape, stop)
            own = (qc.transpose(2, 3).flatten(3, 4) @ kc.transpose(-1, -2)).unflatten(3, (-1, n)).transpose(2, 3)
            text += self.text_bias[:, :, None, start:stop, None, :stop].to(text.dtype)
            own += self.own_bias.to(own.dtype)
            scores = torch.cat((text, own), dim=-1)
            dtype = torch.promote_types(scores.dtype, torch.float32)
            p_text, p_own = scores.softmax(-1, dtype=dtype).to(v_text.dtype).split((stop, m), dim=-1)
            out = (p_text.flatten(2, 4) @ v_text[:, :, :stop]).view(*shape, d)
            out_own = (p_own.transpose(2, 3).flatten(3, 4) @ vc).unflatten(3, (-1, n)).transpose(2, 3)
            outs.append(out + out_own)
        return torch.cat(outs, dim=3).flatten(3, 4).flatten(1, 2)  # (B, H, T*n, d)


class Flex:
    """flex_attention over tiles: the text up to a tile's last position, and the tiles its groups lie in (CUDA).

    A query's visible keys are two ranges and its root, so the mask inside a tile looks nothing up by key.  The tile
    table depends on the packing alone and documents are a tensor that the mask reads, so one instance, built once and
    compiled once, serves every batch of its shape.  Lengths are padded to whole tiles: a padded query sees the first
    text token, a padded key is seen by none.
    """

    TILE = 128

    def __init__(self, packing, batch, place, device):
        described, rows = packing.describe(), packing.rows(place)
        position, _, places = described
        index = torch.arange(packing.n_packed)
        root = torch.where(places < 0, index, packing.n_text + position * packing.n_group)  # a text token is its own
        ranges = (position, index - (places - 1).clamp(min=0), index, root)  # text up to; own branch from, to; root
        self.n_queries, self.starts = len(rows), torch.zeros(batch, packing.n_text, dtype=torch.int32, device=device)
        self.pads = pads = [-len(x) % self.TILE for x in (rows, index)]
        query = [F.pad(x[rows], (0, pads[0]), value=fill) for x, fill in zip(described, (0, -1, -1), strict=True)]
        key = [F.pad(x, (0, pads[1]), value=fill) for x, fill in zip(described, (0, -1, 2**30), strict=True)]
        counts, indices = tile_table(*(x.view(-1, self.TILE) for x in (query[0], query[2], key[0], key[2])))
        position, first, last, root = (F.pad(x[rows], (0, pads[0])).int().to(device) for x in ranges)
        starts = self.starts

        def mask(b, h, q, k):
            text = (starts[b, position[q]] <= k) & (k <= position[q])
            return text | ((first[q] <= k) & (k <= last[q])) | (k == root[q])

        self.block_mask = BlockMask.from_kv_blocks(
            counts[None, None].to(device), indices[None, None].to(device), BLOCK_SIZE=self.TILE, mask_mod=mask,
            seq_lengths=(len(query[0]), len(key[0])))

    def see(self, docs):
        """The documents (B, >= n_text) of the batch that comes; each is one run of positions."""
        docs = docs[:, :self.starts.shape[1]]
        index = torch.arange(docs.shape[1], device=docs.device)
        first = F.pad(torch.where(docs[:, 1:] != docs[:, :-1], index[1:], 0), (1, 0))
        self.starts.copy_(first.cummax(1).values)

    def __call__(self, q, k, v):
        if torch.is_grad_enabled():  # the backward kernel takes a key tile for all heads of its group in one loop: the
            k, v = repeat_heads(q, k, v)  # first tiles, which nearly all queries see, would keep everything waiting
        pads = (self.pads[0], *2 * self.pads[1:])
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x, pad in zip((q, k, v), pads, strict=True))
        return compiled_flex()(q, k, v, block_mask=self.block_mask, enable_gqa=True)[:, :, :self.n_queries]


def tile_table(q_position, q_place, k_position, k_place):
    """Which key tiles each query tile may see, as counts (Q tiles,) and indices (Q tiles, K tiles), by their ranges.

    Arguments are (tiles, 128).  A superset of what is visible: the mask decides inside a tile.
    """
    is_text, is_own = k_place < 0, (k_place >= 0) & (k_place < 2**30)
    far = 2**30
    first_text = torch.where(is_text, k_position, far).amin(1)
    first_own, last_own = torch.where(is_own, k_position, far).amin(1), torch.where(is_own, k_position, -far).amax(1)
    high, thinks = q_position.amax(1, keepdim=True), q_place >= 0  # text and padding have no group
    first, last = (torch.where(thinks, q_position, fill) for fill in (far, -far))
    first, last = first.amin(1, keepdim=True), last.amax(1, keepdim=True)
    seen = (first_text <= high) | ((first_own <= last) & (last_own >= first))
    return seen.sum(1).int(), seen.int().argsort(dim=1, descending=True, stable=True).int()


@lru_cache
def compiled_flex():
    return compiled(flex_attention, dynamic=False)


flex_for_shape = lru_cache(maxsize=64)(Flex)


def packed_attention(packing, docs, place=None):
    """The form of the packed attention that suits the device.

    docs: (B, >= n_text) document ids.  place: None when queries are the whole packed sequence; else those of that place
    alone (0: text and roots), against the keys of all: the steps of a rollout.
    """
    if docs.is_cuda and can_compile(docs.device):
        flex = flex_for_shape(packing, len(docs), place, docs.device)
        flex.see(docs)
        return flex
    return TwoPart(packing, docs, place)
