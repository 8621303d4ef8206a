"""Decoding over a KV cache: a thought before every new token, K - 1 dependent forwards each, or none."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from nanoqstar.attention import dense, few_queries
from nanoqstar.head import compute_dtype, fp32_logits, sample_tokens
from nanoqstar.qwen2 import KVCache

SLOTS = 256  # a cache's length is a multiple of it, so that blocks compiled for one prompt serve others


@dataclass
class Step:
    """One new token of every prompt (B,), with the thought before it (B, S) and the mixing weight it got (B,)."""

    tokens: torch.Tensor
    thoughts: torch.Tensor
    mix: torch.Tensor
    logits: torch.Tensor  # (B, V) mixed, at least fp32, unknown ids at -inf


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Ids (B,) drawn from logits (B, V) after temperature, top-k, top-p, in this order; temperature 0: the likeliest.

    top_k keeps the k likeliest, top_p the fewest of the likeliest whose probabilities reach p (at least one).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, order = probs.sort(descending=True, stable=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)  # what comes before already reaches p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, n_ahead, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Yields a `Step` for each new token of all prompts.

    prompts: non-empty lists of ids, of any lengths (shorter ones are padded on the left, where nothing looks).
    n_ahead: K; 0 for no thoughts: the base model.  Thoughts are sampled at the model's thought temperature.
    generator: of the model's device, for both thoughts and text.
    """
    head, batch = model.lm.head_weight, len(prompts)
    device = head.device
    longest = max(map(len, prompts))
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    text = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    n_slots = n_ahead + longest + max_new_tokens  # a thought's slots come first, and the next thought overwrites them
    n_slots += -n_slots % SLOTS
    cache = KVCache(model.lm.config, batch, n_slots, device, compute_dtype(head))
    slot = torch.arange(n_slots, device=device)
    is_text = (slot >= n_ahead + pads[:, None])[:, None, None]  # (B, 1, 1, n_slots)

    def forward(x, slots, positions, last_text):
        """Hidden states of x at `slots`: text sees text up to itself, a thought that up to `last_text` and itself."""
        cache.slots, query = slots, slots[:, None]
        mask = torch.where(query < n_ahead, is_text & (slot <= last_text) | (slot <= query), is_text & (slot <= query))
        mask = mask | (slot == query)  # padding sees itself
        used = int(last_text) + 1 if device.type == "cpu" else n_slots  # a GPU prefers one shape
        form = few_queries if len(slots) <= 2 else dense  # a step's forwards have one token or two
        return model.lm(x, positions, lambda q, k, v: form(mask[..., :used])(q, k[:, :, :used], v[:, :, :used]), cache)

    def step(newest, n, u):
        """The next token's logits, from the newest token (B,), which is number n (), by way of a thought (B, S)."""
        positions = (n - pads)[:, None]
        text_slot, x = (n + n_ahead)[None], model.lm.embed(newest)[:, None]
        if not n_ahead:
            hidden = forward(x, text_slot, positions, text_slot)[:, -1]
            return fp32_logits(hidden, head, model.banned), newest[:, None][:, :0], torch.zeros_like(hidden[:, 0])
        start, end = (e.to(x.dtype).expand(batch, 1, -1) for e in (model.start_embedding, model.end_embedding))
        hidden = forward(torch.cat((x, start), dim=1), torch.cat((text_slot, slot[:1])),
                         torch.cat((positions, positions + 1), dim=1), text_slot)
        base, thought = hidden[:, 0], []
        for k in range(1, n_ahead - 1):  # t_k from the token before it
            if k > 1:
                hidden = forward(x, slot[k - 1:k], positions + k, text_slot)
            ids, _ = sample_tokens(hidden[:, -1], head, u[:, k - 1:k], model.thought_temperature, model.banned)
            thought.append(ids[:, 0])
            x = model.lm.embed(thought[-1])[:, None]
        last = slot[n_ahead - 2:n_ahead]  # t_S and end
        talk = forward(torch.cat((x, end), dim=1), last, positions + 1 + last, text_slot)[:, -1]
        mix = model.mixing_head(model.mixing_head.base_half(base), talk)
        return fp32_logits(base + mix * (talk - base), head, model.banned), torch.stack(thought, dim=1), mix[:, 0]

    if longest > 1:
        index = torch.arange(longest - 1, device=device)
        with torch.compiler.set_stance("force_eager"):  # blocks are compiled for the steps, not for a prompt's length
            forward(text[:, :-1], index + n_ahead, (index - pads[:, None]).clamp(min=0), index[-1:] + n_ahead)
    newest, run = text[:, -1], step
    for n in torch.arange(longest - 1, longest - 1 + max_new_tokens, device=device):
        u = torch.rand(batch, max(0, n_ahead - 2), generator=generator, device=device)
        inputs = newest, n, u
        if device.type == "cuda" and run is step:
            run = Graph(step, inputs)
        logits, thoughts, mix = run(*inputs)
        newest = sample_token(logits, temperature, top_k, top_p, generator)
        yield Step(newest, thoughts.clone(), mix.clone(), logits.clone())


@lru_cache
def side_stream():
    """One for all captures: libraries keep a workspace for every stream they meet."""
    return torch.cuda.Stream()


class Graph:
    """A function of tensors, captured once as a CUDA graph and replayed: its dependent forwards launch as one."""

    def __init__(self, function, inputs):
        self.inputs = [x.clone() for x in inputs]
        side = side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate on their first calls, which a capture does not allow
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs):
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return self.outputs
