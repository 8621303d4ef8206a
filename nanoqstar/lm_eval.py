"""python -m nanoqstar.lm_eval --model nanoqstar --model_args path=RUN[,thoughts=false] --tasks ..

EleutherAI's lm-evaluation-harness (`pip install -e '.[harness]'`) with one model more; all options
are its own, and `ModelArgs` below has what model_args may hold.

A log-likelihood with thoughts is that of the mixed prediction after one sampled thought at every
position; the same context thinks the same before each of its continuations.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from nanoqstar import InputError, cli


def main(args: list[str]) -> int:
    """The exit code of a command line, which is the harness's own."""
    return cli.command(args, lambda a: (a,), "nanoqstar.lm_eval:run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

import torch
from tqdm import tqdm

from nanoqstar import hf
from nanoqstar.device import autocast, pick_device, pick_threads
from nanoqstar.head import fp32_logits, row_chunks, weighted_log_probs
from nanoqstar.quietstar import uniforms
from nanoqstar.sampling import generate
from nanoqstar.tokenizer import beginning_ids, encode, end_of_text_id

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation, ids


class How(NamedTuple):
    """Of writing: as the harness's gen_kwargs."""

    max_gen_toks: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """What stands after --model_args, as key=value,key=value."""

    path: str = cli.setting(None, "a run's folder, a model folder or a Hub id", at_least=1)
    thoughts: bool = cli.setting(True, "false: the base model alone")
    tokenizer: str | None = cli.setting(None, "folder or Hub id; none: the model's own", at_least=1)
    n_ahead: int | None = cli.setting(None, "of a thought; none: as trained", at_least=3)
    seed: int = cli.setting(0, "of thoughts and text", at_least=0, below=2**63)
    max_length: int | None = cli.setting(None, "tokens of a window; none: the model's context",
                                         at_least=1)

    def __post_init__(self) -> None:
        cli.check(self)


class Scorer:
    """A model behind the harness's three questions; it knows nothing of the harness."""

    def __init__(self, args: ModelArgs, batch_size: int = 16, device: str = "auto") -> None:
        """Raises InputError."""
        on = pick_device(device)
        self.model, self.tokenizer, settings = hf.load_thinker(
            args.path, on, torch.bfloat16 if on.type == "cuda" else torch.float32, args.tokenizer)
        config, taught = self.model.lm.config, settings.thinking.n_ahead
        pick_threads(None, config.hidden_size)
        if args.thoughts and not taught:
            raise InputError(f"{args.path} was never taught to think: add thoughts=false")
        self.n_ahead = (args.n_ahead or taught) if args.thoughts else 0
        self.seed, self.batch_size, self.end_ids = args.seed, batch_size, settings.end_ids
        self.max_length = args.max_length or config.max_context - self.n_ahead
        hf.check_context(config, self.max_length + self.n_ahead)
        self.begin, self.end = beginning_ids(self.tokenizer), end_of_text_id(self.tokenizer)

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids; begin: after those that the tokenizer itself puts before a text, unless there."""
        ids = encode(self.tokenizer, text, "a task's text")
        return [*self.begin, *ids] if begin and ids[:len(self.begin)] != self.begin else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def states(self, text: torch.Tensor, docs: torch.Tensor, index: Iterable[int]) -> torch.Tensor:
        """Hidden states (B, T, D) that predict x_{i+1}; text, docs (B, T+1). index: of the random
        numbers, which depend neither on the batch nor on its padding."""
        if not self.n_ahead:
            return self.model.text_states(text[:, :-1], docs)
        u = uniforms(self.seed, "eval", 0, index, (1, text.shape[1] - 1, self.n_ahead - 2))
        thoughts, _ = self.model.rollout(text, docs, u.to(text.device))
        return self.model.score(text, docs, thoughts).mixed[:, 0, :, 0]

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation: its log-prob, nats, and whether it is the likeliest, token by
        token. What differs in its last token alone shares a row; rows go by length."""
        contexts: dict[tuple[int, ...], int] = {}
        rows: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise InputError(f"a continuation has {len(continuation)} tokens, a window "
                                 f"{self.max_length}: raise max_length, or leave the task out")
            whole = [*context, *continuation][-self.max_length - 1:]
            number = contexts.setdefault(tuple(context), len(contexts))
            rows.setdefault((number, tuple(whole[:-1])), []).append(i)
        queue = sorted(rows.items(), key=lambda row: -len(row[0][1]))
        found: dict[int, tuple[float, bool]] = {}
        for first in tqdm(range(0, len(queue), self.batch_size), disable=None):
            batch = queue[first:first + self.batch_size]
            shape = len(batch), len(batch[0][0][1]) + 1
            text, docs = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
            for row, ((_, ids), _) in enumerate(batch):
                text[row, :len(ids)], docs[row, :len(ids)] = torch.tensor(ids), 0
            members = [(i, row, len(ids)) for row, ((_, ids), same) in enumerate(batch)
                       for i in same]
            head = self.model.lm.head_weight
            with autocast(head.device):
                states = self.states(text.to(head.device), docs.to(head.device),
                                     [number for (number, _), _ in batch])
                hidden = torch.cat([states[row, end - len(pairs[i][1]):end]
                                    for i, row, end in members])
                targets = torch.tensor([x for i, *_ in members for x in pairs[i][1]],
                                       device=head.device)
                none = torch.zeros_like(hidden[:, 0])
                lp = weighted_log_probs(hidden, head, targets, none, exact=True)[1]
            with torch.autocast(head.device.type, enabled=False):  # bf16 would round near ties
                right = torch.cat([fp32_logits(hidden[x], head).argmax(-1) == targets[x] for x in
                                   row_chunks(len(hidden), len(head), head.device)])
            sizes = [len(pairs[i][1]) for i, *_ in members]
            for (i, *_), a, b in zip(members, lp.split(sizes), right.split(sizes), strict=True):
                found[i] = a.double().sum().item(), bool(b.all())
        return [found[i] for i in range(len(pairs))]

    def write(self, prompts: Sequence[Sequence[int]], until: Sequence[str], how: How) -> list[str]:
        """What follows prompts, up to an end of text or the first that has one of `until` in it."""
        room = self.max_length - how.max_gen_toks
        if room < 1:
            raise InputError(f"max_gen_toks={how.max_gen_toks} leaves no room for a prompt in a "
                             f"window of {self.max_length} tokens: lower it")
        order, texts = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), {}
        device = self.model.lm.head_weight.device
        generator = torch.Generator(device).manual_seed(self.seed)
        for first in tqdm(range(0, len(order), self.batch_size), disable=None):
            batch = order[first:first + self.batch_size]
            ids: list[list[int]] = [[] for _ in batch]
            live = set(range(len(batch)))
            for step in generate(self.model, [prompts[i][-room:] for i in batch], how.max_gen_toks,
                                 self.n_ahead, how.temperature, how.top_k, how.top_p, generator):
                newest = step.tokens.tolist()
                for row in sorted(live):
                    if newest[row] not in self.end_ids:
                        ids[row].append(newest[row])
                    text = texts[batch[row]] = self.decode(ids[row])
                    if newest[row] in self.end_ids or any(x in text for x in until if x):
                        live.remove(row)
                if not live:
                    break
        return [texts[i] for i in range(len(prompts))]


@cache
def register() -> type:
    """The harness's class of our model, under the name nanoqstar. InputError: no harness."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise InputError(f"the harness is not installed ({error}): pip install -e '.[harness]'"
                         ) from None

    class NanoQStar(TemplateLM):
        def __init__(self, batch_size: Any = None, max_batch_size: Any = None, device: Any = None,
                     **given: Any) -> None:
            super().__init__()
            known = ModelArgs.__dataclass_fields__
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"model_args: unknown {unknown[0]}"
                                 f"{cli.nearest(unknown[0], known)}; there are {', '.join(known)}")
            size = int(batch_size or 0) if str(batch_size or 0).isdecimal() else 0  # "auto"
            self.scorer = Scorer(ModelArgs(**given), size or 16, device or "auto")

        @property
        def eot_token_id(self) -> int:
            end = [self.scorer.end, *self.scorer.end_ids]
            if end[-1] is None:
                raise InputError("this tokenizer has no token that ends a text, which the task "
                                 "needs")
            return next(x for x in end if x is not None)

        @property
        def prefix_token_id(self) -> int:
            return self.scorer.begin[-1] if self.scorer.begin else self.eot_token_id

        @property
        def tokenizer_name(self) -> str:
            return self.scorer.tokenizer.to_str()

        def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                       **kwargs: Any) -> list[int]:
            return self.scorer.encode(string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            return self.scorer.log_likelihoods([(a, b) for _, a, b in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            pairs, owner = [], []
            for n, request in enumerate(requests):
                for window in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id,
                        self.scorer.max_length, 1):
                    pairs.append(make_disjoint_window(window))
                    owner.append(n)
            sums = [0.0] * len(requests)
            for n, (lp, _) in zip(owner, self.scorer.log_likelihoods(pairs), strict=True):
                sums[n] += lp
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            written: dict[int, str] = {}
            for members in groups.values():
                asked: Any = normalize_gen_kwargs(requests[members[0]].args[1])
                asked.pop("do_sample", None)
                until = asked.pop("until", None) or []
                unknown = asked.keys() - set(How._fields)
                if unknown:
                    raise InputError(f"generation_kwargs: {', '.join(sorted(unknown))} cannot be "
                                     f"had here; there are {', '.join(How._fields)}")
                prompts = [self.tok_encode(requests[i].args[0]) for i in members]
                texts = self.scorer.write(prompts, until, How(**asked))
                written |= {i: postprocess_generated_text(text, until, None)
                            for i, text in zip(members, texts, strict=True)}
            return [written[i] for i in range(len(requests))]

    return register_model("nanoqstar")(NanoQStar)


def run(args: list[str]) -> None:
    """The harness's command line, `args`."""
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *args]
    cli_evaluate()
