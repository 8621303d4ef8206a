"""Decoding in batches that are filled up again; exact match; votes that are kept and counted."""

import json
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tasks import QUESTIONS, TOKENIZERS, K, files  # noqa: F401

from nanoqstar import InputError, answers, parallel
from nanoqstar.answers import FINAL, PROMPT, Job, first_number, majority, vote, write_on
from nanoqstar.files import alone
from nanoqstar.sampling import generate
from nanoqstar.tasks import read_questions, read_texts

TOKENIZER = TOKENIZERS["mistral"]
END = 2  # </s>


# ---- many prompts


def test_a_batch_that_is_filled_up_writes_what_each_prompt_alone_does(make_model):
    """Prompts and limits of several lengths; some end at a token; two are added on the way."""
    model, generator = make_model(), torch.Generator()
    prompts = [[5, 9, 11], [3], [8, 30, 2, 2, 17, 4], [1, 2], [59, 58, 7, 6], [44, 3], [21] * 9]
    limits, expected = [9, 4, 12, 1, 7, 6, 10], {}
    for n, (prompt, limit) in enumerate(zip(prompts, limits)):
        alone = [int(step.tokens) for step in generate(model, [prompt], limit, 0, 0)]
        stop = next((i + 1 for i, t in enumerate(alone) if t % 5 == 0), limit)
        expected[n] = alone[:stop]
    assert {len(x) for x in expected.values()} != set(limits)
    jobs = [Job(n, prompt, limit) for n, (prompt, limit) in enumerate(zip(prompts, limits))]
    waiting, later, written = deque(jobs[:5]), jobs[5:], {}
    for job, new in write_on(model, waiting, 0, lambda job, new: new[-1] % 5 == 0, temperature=0,
                             batch_size=3, generator=generator):
        assert job.key not in written
        written[job.key] = new
        if later:
            waiting.appendleft(later.pop())
    assert written == expected


def test_what_has_ended_is_not_decoded_on(make_model, monkeypatch):
    """Where half of a batch has ended it is filled up, or halved."""
    sizes = []

    def counting(model, prompts, *rest, **options):
        sizes.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(answers, "generate", counting)
    waiting = deque(Job(n, [n + 1], 20 if n in (2, 3) else 2) for n in range(6))
    done = write_on(make_model(), waiting, K, lambda job, new: False, temperature=1.0,
                    batch_size=4, generator=torch.Generator().manual_seed(0))
    assert [len(new) for _, new in done] == [2] * 4 + [20] * 2
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(("text", "number"), [
    (" 1,234 apples", 1234), ("$5.50", 5), ("-7", 7), ("none", None), ("a1b2", 1), ("007", 7),
    ("12,\n34", 12), ("", None)])
def test_the_first_number(text, number):
    assert first_number(text) == number


# ---- a model that says what the test wants


class Scripted:
    """Stands for `sampling.generate`: after a prompt it writes what `script` gives for it, another
    time the next; then it goes on with dashes."""

    def __init__(self, script):
        self.begun, self.script, self.read = [], script, Counter()

    def __call__(self, model, prompts, n, n_ahead, temperature, generator):
        rests = []
        for prompt in prompts:
            known = next((k for k in self.begun if prompt == k[:len(prompt)]
                          and len(prompt) > k.n_prompt), None)
            if known is None:
                text = TOKENIZER.decode(prompt)
                said = self.script(text, n_ahead, self.read[text, n_ahead])
                self.read[text, n_ahead] += 1
                ids = said if isinstance(said, list) else TOKENIZER.encode(
                    said, add_special_tokens=False).ids[1:]  # without the space before
                known = type("Known", (list,), {"n_prompt": len(prompt)})(
                    prompt + ids + [TOKENIZER.token_to_id("-")] * 400)
                self.begun.append(known)
            rests.append(known[len(prompt):])
        for i in range(n):
            yield SimpleNamespace(tokens=torch.tensor([rest[i] for rest in rests]))


@pytest.fixture
def scripted(monkeypatch):
    def use(script):
        stub = Scripted(script)
        monkeypatch.setattr(answers, "generate", stub)
        return stub
    return use


@pytest.fixture
def model(make_model):
    return make_model(vocab_size=TOKENIZER.get_vocab_size())


TEXTS = [(f"Q: {question}\nA:", answer.split("####")[1] + "\n") for question, answer in QUESTIONS]


def begin(model, path):
    answers.begin_answers(path, answers.identity(model, TEXTS, K, 0))


def cast(model, path, n_votes=3, chosen=(0, 1), n_ahead=K, seed=0):
    return vote(model, TOKENIZER, TEXTS, chosen, n_ahead, n_votes, path, end_ids=(END,), seed=seed,
                batch_size=4)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# ---- exact match


def test_exact_match_is_the_first_number_of_the_greedy_text(model, scripted, files):  # noqa: F811
    """With thoughts, twice: the second time wrong."""
    said = {18: "the sum 18 and 20", 1234: "$1,234.", 5: " -5\n", 7: "8", 1090: "no number"}
    stub = scripted(lambda text, n_ahead, n: next(
        words for (question, answer), words in zip(QUESTIONS, said.values())
        if text.endswith(f"{question[-20:]}\nA:")) if n_ahead == 0 or n == 0 else "9\n")
    questions = read_questions("gsm8k", TOKENIZER, files["gsm8k"])
    right = answers.greedy_right(model, TOKENIZER, questions, K, 2, 0, 2, (END,))
    assert right.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert all(text.endswith("\nA:") for text, _ in stub.read)
    assert answers.greedy_right(model, TOKENIZER, questions, 0, 2, 0, 9, ()).shape == (5, 1)


def test_measure_has_both_figures(model, files):  # noqa: F811
    for name in ("gsm8k", "commonsense_qa"):
        questions = read_questions(name, TOKENIZER, files[name])
        found = answers.measure(model, TOKENIZER, questions, K, end_ids=(END,), n_samples=2)
        assert found["n"] == len(questions.items)
        assert 0 < found["answer_prob"]["base"] != found["answer_prob"]["thoughts"]
        assert found["answer_prob"]["spread"] > 0
        assert found["exact_match"].keys() == found["answer_prob"].keys()
        assert answers.measure(model, TOKENIZER, questions, 0, end_ids=()).keys() == found.keys()
    model.lm.config.__dict__["max_position_embeddings"] = 200
    with pytest.raises(InputError, match="273 positions are more than the model's context of 200"):
        answers.measure(model, TOKENIZER, questions, K, end_ids=())


# ---- votes


def test_the_protocol(model, scripted, tmp_path, monkeypatch):
    """How each chain ends, what the model is shown then, and which number counts."""
    monkeypatch.setattr(answers, "CHAIN_TOKENS", 40)
    end = [*TOKENIZER.encode(" so 5", add_special_tokens=False).ids[1:], END]
    chains = [" 3 and 15.\n\nQ: What", " one\n\n\ntwo\n\n\nthree", end, " on and on " + "x" * 60]
    shown = ["3 and 15.", "one\n\n\ntwo", "so 5", "on and on " + "x" * 30]

    def script(text, n_ahead, n):
        if text.endswith(FINAL):
            return {"3": " 1,8 or 9", "o": " what? Q: 18", "s": ": 18."}[
                text.split(PROMPT)[1].strip()[0]]
        assert text == f"Q: {QUESTIONS[0][0]}\nA: Let's think step by step."
        return chains[n]

    stub = scripted(script)
    found = cast(model, tmp_path / "x.jsonl", n_votes=4, chosen=[0], n_ahead=0)
    prompts = [text for text, _ in stub.read if text.endswith(FINAL)]
    first = f"Q: {QUESTIONS[0][0]}\nA: Let's think step by step. "
    assert sorted(prompts) == sorted(
        first + chain + "\nTherefore, the answer (arabic numerals) is" for chain in shown)
    assert {row["text"].removeprefix(first)[0]: row["answer"]
            for row in rows(tmp_path / "x.jsonl")} == {"3": 18, "o": None, "s": 18}
    assert found["n"] == 1


def script_of(table):
    """Chains, and their numbers by question, thoughts and turn."""
    def script(text, n_ahead, n):
        if not text.endswith(FINAL):
            first = "FGIJKLMNO"[n] if n_ahead else "fgijklmno"[n]  # no two chains begin alike
            return first + "-" * (n + 3) + "\n\n\n\n\n\n"
        question = next(i for i, (q, _) in enumerate(QUESTIONS) if q in text)
        number = table[question, n_ahead > 0]["fgijklmno".index(text.split(PROMPT)[1][0].lower())]
        return " none" if number is None else f" {number} apples"
    return script


TABLE = {(0, False): [1, 18, 18], (0, True): [18, 2, 3],  # right: 18
         (1, False): [1234, 5, 5], (1, True): [None, None, 1234]}  # right: 1,234


def test_majorities_by_hand(model, scripted, tmp_path):
    scripted(script_of(TABLE))
    found = cast(model, tmp_path / "x.jsonl")
    kept = {(r["item"], r["vote"], r["thoughts"]): r["answer"] for r in rows(tmp_path / "x.jsonl")}
    assert kept.keys() == {(i, v, t) for i in (0, 1) for v in range(3) for t in (False, True)}
    for (i, thinks), numbers in TABLE.items():  # which turn is which vote is nobody's business
        assert Counter(kept[i, v, thinks] for v in range(3)) == Counter(numbers)
    for k in (1, 2, 3):
        for way in (False, True):
            said = [[kept[i, v, way] for v in range(k)] for i in (0, 1)]
            right = [max(x, key=lambda y, x=x: (x.count(y), -x.index(y))) == number
                     for x, number in zip(said, (18, 1234))]
            assert found[f"maj@{k}"]["thoughts" if way else "base"] == sum(right) / 2


def test_the_majority_of_the_first_k(model, tmp_path):
    """From a file that holds them all: nothing is computed."""
    path = tmp_path / "x.jsonl"
    begin(model, path)
    with path.open("a") as file:
        for (i, thinks), numbers in TABLE.items():
            for v, number in enumerate(numbers):
                file.write(json.dumps({"item": i, "vote": v, "thoughts": thinks,
                                       "answer": number}) + "\n")
    found = cast(model, path)
    assert {k: (x["base"], x["thoughts"]) for k, x in found.items() if k != "n"} == {
        "maj@1": (0.5, 0.5), "maj@2": (0.5, 0.5), "maj@3": (0.5, 0.5)}
    only = {i: cast(model, path, chosen=[i]) for i in (0, 1)}
    assert [[only[i][f"maj@{k}"][way] for k in (1, 2, 3)] for i in (0, 1)
            for way in ("base", "thoughts")] == [[0, 0, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("numbers", "winner"), [
    ([3, 4, 4], 4), ([3, 4], 3), ([4, 3, 3, 4], 4), ([None, None, 5], None), ([5, None], 5)])
def test_majority(numbers, winner):
    assert majority(numbers) == winner


def test_answers_are_kept_and_never_computed_twice(model, scripted, tmp_path):
    """Killed after five answers with half a line written, then more votes and more questions."""
    path, script = tmp_path / "sub" / "x.jsonl", script_of(TABLE)
    said = []

    def dying(text, n_ahead, n):
        said.append(text)
        if sum(text.endswith(FINAL) for text in said) > 5:
            raise KeyboardInterrupt
        return script(text, n_ahead, n)

    scripted(dying)
    with pytest.raises(KeyboardInterrupt):
        cast(model, path)
    kept = path.read_text()
    assert 2 <= len(rows(path)) <= 5
    with path.open("a") as file:
        file.write('{"item": 0, "vote": 2, "thou')
    stub = scripted(script_of({key: [7] * 9 for key in TABLE}))
    cast(model, path)
    assert path.read_text().startswith(kept)
    assert sum(stub.read.values()) == 2 * (12 - kept.count("\n") + 1)
    keys = [(r["item"], r["vote"], r["thoughts"]) for r in rows(path)]
    assert len(set(keys)) == len(keys) == 12
    stub = scripted(script_of({(i, t): [7] * 9 for i in range(3) for t in (False, True)}))
    cast(model, path, n_votes=4, chosen=(0, 1, 2))
    assert sum(stub.read.values()) == 2 * (2 * 2 + 4 * 2)
    assert cast(model, path, n_votes=2)["n"] == 2
    assert len(rows(path)) == 24


def test_a_second_start_draws_other_numbers(model, tmp_path, monkeypatch):
    seeds = []

    def draw(model, waiting, n_ahead, has_ended, *, generator, **options):
        seeds.append(generator.initial_seed())
        return iter(())

    monkeypatch.setattr(answers, "write_on", draw)
    path = tmp_path / "x.jsonl"
    answers.begin_answers(path, {})
    answers.cast_votes(model, TOKENIZER, {0: "Q"}, 0, 1, path, end_ids=(), seed=3, batch_size=1)
    with path.open("a") as file:
        file.write('{"item": 1, "vote": 0, "thoughts": false, "answer": null}\n')
    answers.cast_votes(model, TOKENIZER, {0: "Q"}, 0, 1, path, end_ids=(), seed=3, batch_size=1)
    assert seeds[0] != seeds[1]


def test_ranks_share_the_votes(model, scripted, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    begin(model, path)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "first", lambda act: [])  # what the first one has read
    for rank, n in ((0, 3), (1, 3)):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        scripted(script_of(TABLE))
        before = len(rows(path))
        answers.cast_votes(model, TOKENIZER, {i: TEXTS[i][0] + PROMPT for i in (0, 1)}, 0, 3,
                           path, end_ids=(END,), seed=0, batch_size=8)
        assert len(rows(path)) - before == n
    assert len(answers.read_answers(path)) == 6


def test_answers_of_other_votes_are_refused(model, make_model, tmp_path):
    path = tmp_path / "x.jsonl"
    begin(model, path)
    kept = path.read_bytes()
    other = make_model(vocab_size=TOKENIZER.get_vocab_size())
    with torch.no_grad():
        other.mixing_head[4].weight += 0.1
    for changed, word in (((other, path), "model "),
                          ((model, path, 3, (0,), 7), "n_ahead 5 there, 7 here"),
                          ((model, path, 3, (0,), K, 1), "seed 0 there, 1 here")):
        with pytest.raises(InputError, match=f"another model or other settings.*{word}"):
            cast(*changed)
        assert path.read_bytes() == kept
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\nand a last line without end")
    with pytest.raises(InputError, match="no answer of ours"):
        cast(model, notes)
    assert notes.read_text() == "mine\nand a last line without end"
    for line in (b"x\n", b'{"item": [1]}\n', b'{"item":1,"vote":1,"thoughts":true,"answer":"7"}\n'):
        path.write_bytes(kept + line)
        with pytest.raises(InputError, match="no answer"):
            cast(model, path)


def test_the_official_items():
    assert answers.official_items(1319)[:4] == [30, 754, 429, 1010]
    assert len(set(answers.official_items(1319))) == 128
    with pytest.raises(InputError, match="the file has 7: leave --official_items out"):
        answers.official_items(7)


def test_a_real_model_votes(model, tmp_path, files, monkeypatch):  # noqa: F811
    """Random weights, thoughts and all, to the end of the protocol."""
    monkeypatch.setattr(answers, "CHAIN_TOKENS", 8)
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 5)
    texts = read_texts("gsm8k", files["gsm8k"])
    found = vote(model, TOKENIZER, texts, [0, 4], K, 2, tmp_path / "x.jsonl", end_ids=(END,),
                 seed=0, batch_size=3)
    kept = rows(tmp_path / "x.jsonl")
    assert len(kept) == 8
    assert all(row["text"].count(FINAL) == 1 for row in kept)
    assert len({row["text"] for row in kept}) == 8  # no vote is drawn twice
    assert np.isfinite(found["maj@2"]["difference"])
    about = answers.identity(model, texts, K, 0)
    assert about == answers.identity(model.float(), texts, K, 0)
    model.reread = True
    assert about != answers.identity(model, texts, K, 0)
    model.reread = False


def test_two_commands_do_not_cast_the_same_votes(model, scripted, tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    path.parent.mkdir()
    with alone(path), pytest.raises(InputError, match="another process is writing"):
        cast(model, path)
    assert path.read_bytes() == b""
