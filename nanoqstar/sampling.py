"""Decoding over a KV cache; before every new token a thought, in K - 1 dependent forwards."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nanoqstar import InputError
from nanoqstar.attention import dense, few_queries
from nanoqstar.device import total_memory
from nanoqstar.head import compute_dtype, fp32_logits, inverse_cdf, sample_tokens
from nanoqstar.quietstar import QuietStar
from nanoqstar.qwen2 import KVCache, Qwen2Config

SLOTS = 256  # a cache's length is a multiple of it: blocks compiled for one prompt serve others


@dataclass
class Step:
    """One new token of every prompt (B,), the thought before it (B, S), its mixing weight (B,)."""

    tokens: Tensor
    thoughts: Tensor
    mix: Tensor
    logits: Tensor  # (B, V) mixed, at least fp32, unknown ids at -inf
    rows: Sequence[int]  # which prompts these are: all, but for those that ended and left


def sample_token(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None,
                 u: Tensor | None = None) -> Tensor:
    """Ids (B,) drawn from logits (B, V) after temperature, top-k and top-p, in this order.

    temperature 0: the likeliest. top_k keeps the k likeliest, top_p the fewest of the likeliest
    whose probabilities reach p (at least one). Drawn by u (B, 1) in [0, 1), else by generator.
    """
    if temperature == 0:
        return logits.max(-1).indices  # argmax, in half of its time on a CPU
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)  # a smaller one is rounded to 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # never inf or NaN
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, order = probs.sort(descending=True, stable=True)
        enough = ranked.cumsum(-1) - ranked >= top_p  # what comes before already reaches p
        enough[..., 0] = False  # nothing comes before the likeliest, even where p is rounded to 0
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(enough, 0.0))
    if u is None:
        u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=probs.dtype)
    # torch.multinomial draws a random number for each id
    return inverse_cdf(probs, u.to(probs.dtype))[:, 0]


class Decoder:
    """A batch of prompts being written on: the model, its cache, and who sees which slots of it.

    The first K slots are the thought's, overwritten by the next one; text lies in the others and
    sees text alone. All is allocated once, so that `next_logits` can be captured as a CUDA graph.

    n_text: the most tokens of a prompt and what follows it. n_ahead: K; 0 for no thoughts.
    thought_temperature: 0 for the likeliest thoughts; None: the model's own. earlier: of a prompt
    whose text this one goes on from: the n_read tokens that it has read are not read again.
    InputError: the device's memory can never hold the cache.
    """

    def __init__(self, model: QuietStar, n_prompts: int, n_text: int, n_ahead: int,
                 thought_temperature: float | None = None, earlier: "Decoder | None" = None
                 ) -> None:
        self.model, self.n_ahead, self.head = model, n_ahead, model.lm.head_weight
        own = model.thought_temperature
        self.thought_temperature = own if thought_temperature is None else thought_temperature
        device, dtype, n_slots = self.head.device, compute_dtype(self.head), n_ahead + n_text
        n_slots += -n_slots % SLOTS
        check_memory(model.lm.config, n_prompts * n_slots, device, dtype)
        self.cache = KVCache(model.lm.config, n_prompts, n_slots, device, dtype)
        self.slot = torch.arange(n_slots, device=device)
        self.pads = torch.zeros(n_prompts, dtype=torch.long, device=device)  # left of each prompt
        self.is_text = torch.zeros(n_prompts, 1, 1, n_slots, dtype=torch.bool, device=device)
        self.n_read = 0  # tokens of the text that `write` has put into the cache
        if earlier is not None:
            assert n_prompts == len(earlier.pads) == 1 and n_ahead == earlier.n_ahead
            self.n_read, held = earlier.n_read, slice(n_ahead, n_ahead + earlier.n_read)
            for kind in ("keys", "values"):
                for new, old in zip(getattr(self.cache, kind), getattr(earlier.cache, kind)):
                    new[:, :, held] = old[:, :, held]

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts (none empty) as the first text to be read: tokens (B, N), their numbers (N,).

        Shorter ones are padded on the left, where nothing looks; earlier prompts are forgotten, but
        for the n_read tokens that they share with the new one.
        """
        longest, device = max(map(len, prompts)), self.slot.device
        pads = [longest - len(p) for p in prompts]
        self.pads.copy_(torch.tensor(pads))
        self.is_text.copy_((self.slot >= self.n_ahead + self.pads[:, None])[:, None, None])
        text = torch.tensor([[0] * n + list(p) for n, p in zip(pads, prompts)], device=device)
        return text[:, self.n_read:], torch.arange(self.n_read, longest, device=device)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone."""
        for kind in (self.cache.keys, self.cache.values):
            for layer, x in enumerate(kind):  # one layer is there twice, not all
                kind[layer] = x[rows]
        self.pads, self.is_text = self.pads[rows], self.is_text[rows]

    def think(self, text: Tensor, n: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """A thought (B, S) after text that is read with it (B, N), its numbers (N,); drawn by u
        (B, S) in [0, 1).

        Returns it and the base hidden state (B, D) of the newest token.
        """
        lm, positions, text_slots = self.model.lm, n - self.pads[:, None], n + self.n_ahead
        thought: list[Tensor] = []
        x, last_text = lm.embed(text), text_slots[-1:]
        first = positions[:, -1:] + (0 if self.model.reread else 1)  # of the thought
        start = self.model.delimiter(self.model.start_embedding, x[:, -1:])
        hidden = self.forward(torch.cat((x, start), dim=1), torch.cat((text_slots, self.slot[:1])),
                              torch.cat((positions, first), dim=1), last_text)
        base = hidden[:, -2]
        for k in range(1, self.n_ahead - 1):  # t_k from the token before it
            if k > 1:
                x = lm.embed(thought[-1])
                hidden = self.forward(x, self.slot[k - 1:k], first + k - 1, last_text)
            if self.thought_temperature == 0:
                logits = fp32_logits(hidden[:, -1], self.head, self.model.banned)
                ids = logits.max(-1, keepdim=True).indices
            else:
                ids, _ = sample_tokens(hidden[:, -1], self.head, u[:, k - 1:k],
                                       self.thought_temperature, self.model.banned)
            thought.append(ids)
        return torch.cat(thought, dim=1), base

    @torch.no_grad()
    def next_logits(self, text: Tensor, n: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token's logits (B, V), the thought (B, S) behind them, its mixing weight (B,).

        Arguments as of `think`: all of the prompts, then one token at a time. On a GPU nothing here
        depends on more than their shapes.
        """
        model, positions, text_slots = self.model, n - self.pads[:, None], n + self.n_ahead
        if not self.n_ahead:
            x = model.lm.embed(text)
            base = self.forward(x, text_slots, positions, text_slots[-1:])[:, -1]
            logits = fp32_logits(base, self.head, model.banned)
            return logits, u.long(), torch.zeros_like(base[:, 0])
        thought, base = self.think(text, n, u)
        x, last = model.lm.embed(thought[:, -1:]), self.slot[self.n_ahead - 2:self.n_ahead]
        x = torch.cat((x, model.delimiter(model.end_embedding, x)), dim=1)
        places = positions[:, -1:] + 1 + last
        if model.reread:  # start and end take none
            places = places - self.slot[1:3]
        talk = self.forward(x, last, places, text_slots[-1:])[:, -1]
        mix = model.mixing_head(model.mixing_head.base_half(base), talk)
        return fp32_logits(base + mix * (talk - base), self.head, model.banned), thought, mix[:, 0]

    @torch.no_grad()
    def forward(self, x: Tensor, slots: Tensor, positions: Tensor, last_text: Tensor) -> Tensor:
        """Hidden states of x at `slots`: text sees text up to itself, a thought that up to
        `last_text` and itself."""
        self.cache.slots, query, slot = slots, slots[:, None], self.slot
        by_thought = self.is_text & (slot <= last_text) | (slot <= query)
        mask = torch.where(query < self.n_ahead, by_thought, self.is_text & (slot <= query))
        mask = mask | (slot == query)  # padding sees itself
        on_cpu = slot.device.type == "cpu"
        used = int(last_text) + 1 if on_cpu else len(slot)  # a GPU prefers one shape
        is_step = len(slots) <= 2  # else the prompts: blocks are compiled for the steps
        attend = (few_queries if is_step and not on_cpu else dense)(mask[..., :used])
        with nullcontext() if is_step else torch.compiler.set_stance("force_eager"):
            return self.model.lm(
                x, positions, lambda q, k, v: attend(q, k[:, :, :used], v[:, :, :used]), self.cache)


    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0,
              top_k: int | None = None, top_p: float | None = None,
              generator: torch.Generator | None = None, uniforms: Tensor | None = None,
              ended: Container[int] = (), choose: Callable[[Tensor], Tensor] | None = None
              ) -> Iterator[Step]:
        """`generate` with this decoder, of as many prompts as it was made for."""
        rows, n_sampled = list(range(len(prompts))), max(0, self.n_ahead - 2)
        text, n = self.begin(prompts)
        device, longest = text.device, max(map(len, prompts))
        step: Callable[..., tuple[Tensor, ...]] = self.next_logits
        for i in range(max_new_tokens):
            live = [at for at, row in enumerate(rows) if row not in ended]
            if not live:
                return
            if 2 * len(live) <= len(rows):  # not at each end: a batch size is a graph on a GPU
                rows, text, step = [rows[at] for at in live], text[live], self.next_logits
                self.keep(live)
            text_u = None
            if uniforms is None:
                u = torch.rand(len(rows), n_sampled, generator=generator, device=device)
            else:
                u, text_u = uniforms[rows, i].to(device).split((n_sampled, 1), dim=1)
            if i and text.is_cuda and not isinstance(step, Graph):
                step = Graph(self.next_logits, (text, n, u))  # the prompts have been read
            logits, thoughts, mix = step(text, n, u)
            if not logits.amax(-1).isfinite().all():
                raise InputError("the model's logits are not finite (NaN or infinite): its weights "
                                 f"are damaged or too large for {self.head.dtype}: take others")
            newest = choose(logits) if choose else sample_token(
                logits, temperature, top_k, top_p, generator, text_u)
            text, n, self.n_read = newest[:, None], n[-1:] + 1, longest + i
            yield Step(newest, thoughts.clone(), mix.clone(), logits.clone(), rows)


def check_memory(config: Qwen2Config, n_slots: int, device: torch.device, dtype: torch.dtype
                 ) -> None:
    """InputError where keys and values of n_slots tokens are more than all of the memory."""
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    need, there = size * n_slots * dtype.itemsize, total_memory(device)
    if need > there:
        raise InputError(f"the keys and values of {n_slots:,} tokens take {need / 1e9:,.0f} GB, of "
                         f"{there / 1e9:.0f} GB of memory: write fewer texts at once, fewer tokens "
                         "(max_new_tokens) or shorter thoughts (n_ahead)")


def generate(model: QuietStar, prompts: Sequence[Sequence[int]], max_new_tokens: int, n_ahead: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             generator: torch.Generator | None = None, *, uniforms: Tensor | None = None,
             ended: Container[int] = (), thought_temperature: float | None = None,
             choose: Callable[[Tensor], Tensor] | None = None) -> Iterator[Step]:
    """Yields a `Step` for each new token of all prompts: non-empty lists of ids, of any lengths.

    n_ahead: K; 0 for no thoughts: the base model. thought_temperature: 0 for the likeliest
    thoughts; None: the model's own. All is drawn by generator, of the model's device; or by
    uniforms (B, max_new_tokens, S + 1) in [0, 1), those of the thought and then the token's: what a
    prompt gets does not depend on the others. ended: a set to which the caller may add the indices
    of prompts that need no more: once half of them have ended they leave the batch, and when all
    have it is over. choose: logits (B, V) -> ids (B,), in place of temperature, top_k and top_p.
    InputError: NaN logits; a cache larger than the memory.
    """
    n_text = max(map(len, prompts)) + max_new_tokens
    return Decoder(model, len(prompts), n_text, n_ahead, thought_temperature).write(
        prompts, max_new_tokens, temperature, top_k, top_p, generator, uniforms, ended, choose)


@lru_cache
def side_stream() -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for every stream they meet."""
    return torch.cuda.Stream()


class Graph:
    """A function of tensors, captured as a CUDA graph: its dependent forwards launch as one."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]],
                 inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        side = side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate on their first calls: not in a capture
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return self.outputs
