"""The packed layout: where every token of text, thoughts and lookahead stands, and what it may see.

One sequence holds a window's text once, then one group per thinking position i:

    [ x_0 .. x_{T+A-2} | group(0) | group(1) | .. | group(T-1) ]
    group(i)  = start, branch(pass 0), .., branch(pass P-1)
    branch(p) = t_1 .. t_S, end, x_{i+1} .. x_{i+A-1}                 S + A tokens

All passes of a position share its start token: it is the same vector seeing the same text, so one
copy computes what P would. Groups lie in order of position, which makes a group's own keys
neighbours and the text that a run of queries sees a prefix. RoPE goes on from i: start at i+1, t_k
at i+1+k, end at i+K, x_{i+k} at i+K+k. Delimiters that re-read stand where what they read stands:
start at i, t_k at i+k, end at i+S, x_{i+k} at i+S+k.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

Tokens = tuple[torch.Tensor, ...]  # position, pass, offset, and for `visible` document


@dataclass(frozen=True)
class Packing:
    """Geometry alone: `n_text` tokens of text, then a group of a root and branches per position."""

    n_text: int
    n_positions: int  # T
    n_passes: int  # P
    n_branch: int  # tokens of a branch
    still: tuple[int, ...] = ()  # offsets that take no RoPE position: they stand on the one before

    @property
    def n_group(self) -> int:
        return 1 + self.n_passes * self.n_branch

    @property
    def n_packed(self) -> int:
        return self.n_text + self.n_positions * self.n_group

    @lru_cache
    @torch.inference_mode(False)
    def describe(self, device: torch.device | None = None) -> Tokens:
        """What each packed token is: its position i, pass and offset, each (n_packed,) int64.

        Offset: -1 for text, 0 for the root (start), 1.. along a branch; pass: -1 for text and root.
        """
        none, branch = torch.full((self.n_text,), -1), torch.arange(1, self.n_branch + 1)
        offset = torch.cat((torch.zeros(1).long(), branch.repeat(self.n_passes)))
        pass_ = torch.cat((none[:1], torch.arange(self.n_passes).repeat_interleave(self.n_branch)))
        position = torch.arange(self.n_positions).repeat_interleave(self.n_group)
        described = (torch.cat((torch.arange(self.n_text), position)),
                     torch.cat((none, pass_.repeat(self.n_positions))),
                     torch.cat((none, offset.repeat(self.n_positions))))
        return tuple(x.to(device) for x in described)

    @lru_cache
    @torch.inference_mode(False)
    def rope_positions(self, device: torch.device | None = None) -> torch.Tensor:
        """RoPE position of every packed token, (n_packed,)."""
        position, _, offset = self.describe(device)
        return position + offset + 1 - sum((offset >= still).long() for still in self.still)

    @lru_cache
    @torch.inference_mode(False)
    def rows(self, offset: int | None, device: torch.device | None = None) -> torch.Tensor:
        """Indices of the packed tokens that are queries when a rollout is at `offset`."""
        return query_rows(self.describe()[2], offset).to(device)

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, n_packed, ..) -> text, roots and branches, all views.

        They are (B, n_text, ..), (B, T, ..) and (B, P, T, n_branch, ..).
        """
        text, groups = packed.split((self.n_text, self.n_packed - self.n_text), dim=1)
        groups = groups.unflatten(1, (self.n_positions, self.n_group))
        branches = groups[:, :, 1:].unflatten(2, (self.n_passes, self.n_branch))
        return text, groups[:, :, 0], branches.transpose(1, 2)


@dataclass(frozen=True)
class ThoughtLayout:
    """All arithmetic of n_ahead, n_ahead_talk, n_passes, in windows of T + A tokens (paper 4.2)."""

    n_ahead: int  # K: tokens of a thought, start and end included
    n_ahead_talk: int  # A: true tokens predicted after a thought
    n_passes: int  # P: thoughts per position
    n_positions: int  # T: positions that think
    reread: bool = False  # start re-reads x_i, end t_S

    def __post_init__(self) -> None:
        assert self.n_ahead >= 3, self
        assert min(self.n_ahead_talk, self.n_passes, self.n_positions) >= 1, self

    @classmethod
    def of(cls, text: torch.Tensor, thoughts: torch.Tensor, reread: bool = False
           ) -> "ThoughtLayout":
        """Read off the shapes of text (B, T+A) and of thoughts or their uniforms (B, P, T, S)."""
        n_windows, n_passes, n_positions, n_sampled = thoughts.shape
        assert len(text) == n_windows, (text.shape, thoughts.shape)
        return cls(n_sampled + 2, text.shape[1] - n_positions, n_passes, n_positions, reread)

    @property
    def n_sampled(self) -> int:  # S
        return self.n_ahead - 2

    @property
    def n_text(self) -> int:
        # the lookahead of the last thinker's thoughts needs the states of A - 1 tokens past it
        return self.n_positions + self.n_ahead_talk - 1

    @property
    def still(self) -> tuple[int, ...]:
        """Offsets of start and end where they re-read."""
        return (0, self.n_sampled + 1) if self.reread else ()

    @property
    def packing(self) -> Packing:
        """Of the one forward that scores."""
        n_branch = self.n_sampled + self.n_ahead_talk
        return Packing(self.n_text, self.n_positions, self.n_passes, n_branch, self.still)

    @property
    def rollout_packing(self) -> Packing:
        """Of the KV cache in a rollout: t_S is never an input, end and lookahead come later."""
        return Packing(self.n_text, self.n_positions, self.n_passes, self.n_sampled - 1, self.still)

    def pack(self, text: torch.Tensor, thoughts: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids of the packed sequence, and where start and end stand: they have none, so there are
        those that they may re-read, x_i and t_S.

        text: (B, T+A). thoughts: (B, P, T, S). Returns ids (B, n_packed), is_start and is_end
        (n_packed,) bool.
        """
        n_windows = len(text)
        expected = (n_windows, self.n_passes, self.n_positions, self.n_sampled)
        assert thoughts.shape == expected, thoughts.shape
        assert text.shape == (n_windows, self.n_positions + self.n_ahead_talk), text.shape
        ids = text.new_zeros(n_windows, self.packing.n_packed)
        base, start, branches = self.packing.split(ids)  # views: filling them fills ids
        base.copy_(text[:, :self.n_text])
        start.copy_(text[:, :self.n_positions])
        branches[..., :self.n_sampled] = thoughts
        branches[..., self.n_sampled] = thoughts[..., -1]
        lookahead = text[:, 1:].unfold(1, self.n_ahead_talk, 1)[:, None, :, :-1]
        branches[..., self.n_sampled + 1:] = lookahead
        offset = self.packing.describe(text.device)[2]
        return ids, offset == 0, offset == self.n_sampled + 1


def query_rows(offsets: torch.Tensor, offset: int | None) -> torch.Tensor:
    """Which tokens at offsets are queries: all (None), text and roots (0), or one offset's."""
    if offset is None:
        return torch.arange(len(offsets), device=offsets.device)
    return (offsets <= 0 if offset == 0 else offsets == offset).nonzero()[:, 0]


def visible(query: Tokens, key: Tokens) -> torch.Tensor:
    """The one definition of who sees whom; every mask is built from it or tested against it.

    query, key: (position, pass, offset, document) of packed tokens, broadcastable int tensors.
    Returns bool.
    """
    q_position, q_pass, q_offset, q_document = query
    k_position, k_pass, k_offset, k_document = key
    text = (k_offset < 0) & (k_position <= q_position) & (k_document == q_document)
    own = ((k_offset >= 0) & (k_offset <= q_offset) & (k_position == q_position)
           & ((k_pass == q_pass) | (k_offset == 0)))
    return text | own


def dense_mask(packing: Packing, docs: torch.Tensor) -> torch.Tensor:
    """The definition as (B, 1, n_packed, n_packed) bool, True: visible; docs (B, >= n_text) ids."""
    position, pass_, offset = packing.describe(docs.device)
    docs = docs[:, None, position]  # a group belongs to its position's document
    query = (position[:, None], pass_[:, None], offset[:, None], docs[..., :, None])
    return visible(query, (position, pass_, offset, docs[..., None, :]))
