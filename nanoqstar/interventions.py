"""What the thoughts of a finished run on the embedded corpus do, by changing them; and what its
base knows without having been taught to think, by letting it vote.

All of direct answers to held-out problems; an answer is the likeliest of the letters, unless said.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanoqstar import hf
from nanoqstar.dataset import TokenDataset
from nanoqstar.evaluate import TextScores, score_text
from nanoqstar.quietstar import QuietStar, Rollout
from nanoqstar.sampling import generate

VOTES = (1, 4, 16)  # asides that a vote is taken over


def replay(thoughts: torch.Tensor) -> Rollout:
    """A rollout that hands out thoughts (n, T, S), in this order, whatever the text is."""
    rest = thoughts

    def rollout(text: torch.Tensor, docs: torch.Tensor, uniforms: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal rest
        here, rest = rest[:len(text), None], rest[len(text):]
        return here, torch.zeros_like(uniforms)
    return rollout


def corrupted(thoughts: torch.Tensor, n_letters: int, seed: int) -> Iterator[torch.Tensor]:
    """thoughts (m, S) with each token in turn another letter, at random; the ids of letters are
    those below n_letters."""
    steps = torch.randint(1, n_letters, thoughts.shape,
                          generator=torch.Generator().manual_seed(seed))
    for k in range(thoughts.shape[1]):
        other = thoughts.clone()
        other[:, k] = (thoughts[:, k] + steps[:, k]) % n_letters
        yield other


def write_out(base: QuietStar, prompts: Sequence[Sequence[int]], opening: int, closing: int,
              n_sampled: int, n_letters: int, votes: int, seed: int) -> torch.Tensor:
    """What follows asides that a model without thoughts writes out after its prompts: a mark that
    opens them, n_sampled tokens of its own at temperature 1, a mark that closes them.

    Returns the letters' probabilities (votes, len(prompts), n_letters).
    """
    device = base.lm.head_weight.device
    generator, found = torch.Generator(device).manual_seed(seed), []
    for _ in range(votes):
        opened = [[*prompt, opening] for prompt in prompts]
        steps = generate(base, opened, n_sampled, 0, generator=generator)
        asides = torch.stack([step.tokens for step in steps], 1).tolist()
        closed = [[*prompt, *aside, closing] for prompt, aside in zip(opened, asides)]
        (after,) = generate(base, closed, 1, 0, temperature=0)
        found.append(after.logits.softmax(-1)[:, :n_letters])
    return torch.stack(found)


@torch.no_grad()
def measure(run: Path) -> dict[str, float]:
    """Shares by row of a table, and two counts, of a finished run whose data/ is in its folder.

    A vote is the sum of the probabilities that a letter has after each aside.
    """
    from data import fold

    model, _, settings = hf.load_thinker(run)
    cfg, thinking, n_letters = settings.config, settings.thinking, len(fold.LETTERS)
    base, operations = hf.load_thinker(cfg["model_path"] or run / "base")[0], cfg["fold_operations"]
    text, docs = TokenDataset(run / "data", "val").evenly(
        cfg["eval_windows"], cfg["max_length"] + thinking.n_ahead_talk)
    direct = [(n, answer - 1, problem) for n, ids in enumerate(text.tolist())
              for style, answer, problem in fold.find_answers(fold.decode(ids, operations))
              if style == "direct" and answer <= cfg["max_length"]]
    windows, at = torch.tensor([x[:2] for x in direct]).T
    right, problems = text[windows, at + 1], [problem for _, _, problem in direct]

    solve = fold.solver(cfg["seed"], cfg["fold_operands"], operations, cfg["fold_family"])

    def leads_to(thought: str, problem: str) -> int:
        """The id of a thought's last letter, or of a fold's last step from it, where it lacks it:
        it opens an aside and has no room for that one."""
        last = next((x for x in reversed(thought) if x in fold.LETTERS), fold.LETTERS[0])
        if (cfg["fold_family"] == "fold" and thought[0] == "("
                and set(thought[1:]) <= set(fold.LETTERS) and len(thought) == len(solve(problem))):
            last = solve(last + problem[-1 - (operations > 1):])[-1]
        return fold.LETTERS.index(last)

    def score(sampler: Rollout | None, choices: int) -> TextScores:
        return score_text(model, text, docs, thinking.n_ahead, thinking.n_ahead_talk,
                          seed=cfg["seed"], sampler=sampler, choices=range(choices))

    def share(hits: torch.Tensor) -> float:
        return hits.double().mean().item()

    def with_thoughts(given: torch.Tensor) -> torch.Tensor:
        """The answers that thoughts (m, S) before the m direct ones lead to."""
        thoughts = own.thoughts.clone()
        thoughts[windows, at] = given
        return score(replay(thoughts), n_letters).mixed_choice[windows, at]

    own = score(None, n_letters)
    of_all = score(replay(own.thoughts), model.lm.config.vocab_size)
    found = {"answers": float(len(direct)), "problems": float(len(set(problems)))}
    for name, scores in (("letters", own), ("all characters", of_all)):
        found |= {f"right of {name}, without thoughts":
                      share(scores.base_choice[windows, at] == right),
                  f"right of {name}": share(scores.mixed_choice[windows, at] == right)}
    thoughts = own.thoughts[windows, at]
    given, other = thoughts.roll(1, 0), torch.tensor(
        [a != b for a, b in zip(problems, [problems[-1], *problems])])
    answers = with_thoughts(given)
    led = torch.tensor([leads_to(fold.decode(thought, operations), problem)
                        for thought, problem in zip(given.tolist(), problems)])
    found |= {
        "another problem's thought: right": share((answers == right)[other]),
        "another problem's thought: the letter it leads to": share((answers == led)[other])}
    for k, given in enumerate(corrupted(thoughts, n_letters, cfg["seed"]), 1):
        found[f"another letter at token {k} of the thought: right"] = share(
            with_thoughts(given) == right)

    prompts: dict[str, list[int]] = {}  # as in training, lines come before a problem
    for n, i, problem in direct:
        prompts[problem] = max(prompts.get(problem, []), text[n, :i + 1].tolist(), key=len)
    solved = torch.tensor(list(dict(zip(problems, right.tolist())).values()))  # prompts' order
    opening, closing = fold.encode("()", fold.vocabulary()).tolist()
    after = write_out(base, list(prompts.values()), opening, closing, cfg["fold_operands"],
                      n_letters, max(VOTES), cfg["seed"])
    for n in VOTES:
        found[f"the untrained base, by a vote of {n} written asides: right"] = share(
            after[:n].sum(0).argmax(-1) == solved)
    return found
