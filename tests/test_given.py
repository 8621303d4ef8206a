"""Given thoughts, from a line of JSON to the loss: each step against something independent."""

import dataclasses
import gzip
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from prepared import assert_refused, make_tokenizer, runner, sentences, write_jsonl
from test_train import before_call, check_refused, kill, learned, rows, small, start
from tokenizers import Tokenizer, processors

import train as script
from data import fold, prepare
from data.writer import split_of, write_dataset
from nanoqstar import InputError, runlog
from nanoqstar.attention import dense
from nanoqstar.dataset import THOUGHTS, TokenDataset
from nanoqstar.objective import Objective, Valid
from nanoqstar.stages import load_given
from nanoqstar.state import States

# ---- the loss


def naive_loss(model, text, docs, thoughts, given, n_talk, objective):
    """By a plain causal forward over the own sequence of each position, in float64."""
    def hidden(vectors, positions):
        n = len(vectors)
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        return model.lm(vectors[None], positions, dense(causal))[0]

    def log_probs(states, banned=None):
        logits = states @ model.lm.head_weight.T
        if banned is not None:
            logits = logits.masked_fill(banned, -torch.inf)
        return logits.log_softmax(-1)

    base_nll, taught, talk_nll = [], [], [[] for _ in range(n_talk)]
    for x, doc, rows_, known in zip(text, docs, thoughts[:, 0], given[:, 0]):
        plain = bool((known < 0).all())
        def base_state(i, x=x, doc=doc):
            first = int((doc == doc[i]).nonzero()[0])
            return hidden(model.lm.embed(x[first:i + 1]), torch.arange(first, i + 1))[-1]

        for i, ids in enumerate(rows_):
            if plain and doc[i + 1] == doc[i]:
                base_nll.append(-log_probs(base_state(i))[x[i + 1]])
            first, n = int((doc == doc[i]).nonzero()[0]), len(ids)
            before, thought = model.lm.embed(x[first:i + 1]), model.lm.embed(ids)
            begin, finish = model.start_embedding[None], model.end_embedding[None]
            at = i + 1  # where start stands
            if model.reread:
                begin, finish, at = begin + before[-1:], finish + thought[-1:], i
            ahead = model.lm.embed(x[i + 1:i + n_talk])
            places = [*range(first, i + 1), at, *range(at + 1, at + 1 + n)]
            places += [places[-1] + (not model.reread) + k for k in range(n_talk)]
            states = hidden(torch.cat((before, begin, thought, finish, ahead)),
                            torch.tensor(places))[len(before):]
            lp = log_probs(states[:n], model.banned)
            taught += [-lp[k, ids[k]] for k in range(n) if known[i, k] >= 0]
            for k in range(n_talk):
                if all(doc[i + 1 + j] == doc[i] for j in range(k + 1)):
                    own, other = states[n + 1 + k], base_state(i + k)
                    if known[i, -1] >= 0:
                        taught.append(-log_probs(own)[x[i + 1 + k]])
                    if not plain:
                        continue
                    w = torch.nn.Sequential(*model.mixing_head)(torch.cat((other, own)))
                    talk_nll[k].append(-log_probs((1 - w) * other + w * own)[x[i + 1 + k]])
    means = [torch.stack(x).mean() for x in talk_nll]
    return (objective.base_weight * torch.stack(base_nll).mean()
            + objective.mixed_weight * torch.stack(means).mean() + torch.stack(taught).mean())


@pytest.fixture
def given():
    """Whole thoughts, short ones and none; in two windows none at all."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, 60, (4, 1, 10, 3), generator=generator)
    ids[torch.arange(3).expand(ids.shape) >= torch.randint(0, 4, (4, 1, 10, 1),
                                                           generator=generator)] = -1
    ids[1:3] = -1
    return ids


def test_the_loss_is_that_of_each_position_by_itself(make_model, make_text, given, reread):
    """Several documents; value and every gradient, in two micro-batches as in one."""
    model, (text, docs) = make_model(reread=reread), make_text(4, 13)
    objective = Objective(base_weight=0.7, mixed_weight=0.4, policy_weight=10.0)
    u = torch.rand(given.shape, generator=torch.Generator().manual_seed(4))
    thoughts, _ = model.rollout(text, docs, u, given)
    expected = naive_loss(model, text, docs, thoughts, given, 3, objective)
    names, parameters = zip(*model.named_parameters())
    slopes = torch.autograd.grad(expected, parameters)
    whole = given[:, 0, :, 2] >= 0
    n_taught = (given >= 0).sum() + sum((whole & (docs[:, k:10 + k] == docs[:, :10])).sum()
                                        for k in (1, 2, 3))
    counts = torch.cat((Valid.from_docs(docs[1:3], 3).counts(), n_taught[None]))
    losses = []
    for part in (slice(0, 2), slice(2, 4)):
        losses.append(model.given_loss(text[part], docs[part], thoughts[part], given[part], counts,
                                       objective))
        losses[-1][0].backward()
    assert abs(sum(loss for loss, _ in losses) - expected) < 1e-12
    for name, p, slope in zip(names, parameters, slopes):
        torch.testing.assert_close(p.grad, slope, rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_not_given_is_sampled_after_what_is(make_model, make_text, given, reread):
    """As a rollout of those very tokens would have it: with the same random numbers, thoughts that
    are given in full are what a rollout without any sampled."""
    model, (text, docs) = make_model(reread=reread), make_text(4, 13)
    u = torch.rand(given.shape, generator=torch.Generator().manual_seed(4))
    free, free_lp = model.rollout(text, docs, u)
    thoughts, _ = model.rollout(text, docs, u, given)
    assert torch.equal(thoughts[given >= 0], given[given >= 0])
    none = (given < 0).all(-1)
    assert none.any() and torch.equal(thoughts[none], free[none])
    shown = torch.where(torch.arange(3) < 2, free, -1)  # the first two of its own: the rest follows
    again, lp = model.rollout(text, docs, u, shown)
    assert torch.equal(again, free) and torch.equal(lp, free_lp)
    short = (given[..., 0] >= 0) & (given[..., 1] < 0)
    assert (thoughts[short] != free[short])[..., 1:].any()


def test_an_update_without_given_thoughts_teaches_none(make_model, make_text):
    model, (text, docs) = make_model(), make_text(2, 12)
    given, u = torch.full((2, 1, 10, 3), -1), torch.rand(2, 1, 10, 3)
    valid = Valid.from_docs(docs, 2).counts()
    thoughts, lp = model.rollout(text, docs, u, given)
    loss, stats = model.given_loss(text, docs, thoughts, given,
                                   torch.cat((valid, torch.zeros(1))), Objective())
    other, _ = model.loss(text, docs, thoughts, lp, valid, Objective(policy_weight=0.0))
    assert abs(loss - other) < 1e-12 and stats["nll_given"] == 0


# ---- windows


@pytest.fixture
def data(tmp_path):
    """120 tokens, each its own index, in documents of ten; thoughts at 0, 30, 31, 31 and 118."""
    thoughts = [(31, [5, 6]), (0, [1, 2, 3, 4]), (118, [9]), (30, [7, 7, 7, 8]), (31, [4, 4, 4, 9])]
    write_dataset(tmp_path / "data", "{}", 120, None, {
        "train": np.arange(120).reshape(12, 10), "val": [[1, 2]]}, {}, thoughts)
    return TokenDataset(tmp_path / "data", "train")


def test_windows_stand_around_thoughts_and_hold_all_that_are_inside(data):
    text, docs, given = data.thought_batch(0, 3, range(800), 6, 2, 3)
    assert text.shape == docs.shape == (800, 8) and given.shape == (800, 1, 6, 3)
    assert (docs == text // 10).all()
    assert (given[::2] == -1).all()  # of step 3; the others are of any text
    assert len(text[::2, 0].unique()) > 100
    assert len(text[1::2, 0].unique()) < 25
    odd = data.thought_batch(0, 4, range(800), 6, 2, 3)[2]
    assert (odd[1::2] == -1).all() and (odd[::2] >= 0).any()
    text, given = text[1::2], given[1::2]
    expected = {0: {(1, 2, 3)}, 30: {(7, 7, 7)}, 31: {(5, 6, -1), (4, 4, 4)}}  # 118: no window's
    seen, held = {}, []
    for x, row in zip(text.tolist(), given[:, 0].tolist()):
        for token, ids in zip(x, row):
            if token in expected:
                assert tuple(ids) in expected[token], (token, ids)
                seen.setdefault(token, set()).add(tuple(ids))
            else:
                assert ids == [-1, -1, -1]
        held += [x.index(30)] if 30 in x[:6] else []
    assert seen == expected
    assert set(held) == set(range(6))  # anywhere in its window


def test_windows_depend_on_step_and_index_alone(data):
    whole = data.thought_batch(7, 2, range(20), 6, 2, 3)
    part = data.thought_batch(7, 2, range(12, 15), 6, 2, 3)
    assert all(torch.equal(a[12:15], b) for a, b in zip(whole, part))
    for seed, step in ((8, 2), (7, 3)):
        assert not torch.equal(data.thought_batch(seed, step, range(20), 6, 2, 3)[0], whole[0])


def test_the_update_counts_what_it_divides_by(data):
    cfg = small(max_length=6, n_ahead=5, n_ahead_talk=2, batch_size=4, grad_accum=3, n_passes=1)
    _, docs, given, counts = load_given(data, 1, cfg)
    plain = docs[(given[:, 0] < 0).all(-1).all(-1)]  # half of them, and those around 118
    assert 6 < len(plain) < 12
    n_base = int((plain[:, 1:7] == plain[:, :6]).sum())
    n_far, whole = int((plain[:, 2:8] == plain[:, :6]).sum()), given[:, 0, :, 2] >= 0
    after = sum(int((whole & (docs[:, k:6 + k] == docs[:, :6])).sum()) for k in (1, 2))
    assert counts.tolist() == [n_base, n_base, n_far, n_far, (given >= 0).sum() + after]
    batches, same = script.load_batches(data, "warm", 1, cfg)
    assert torch.equal(same, counts) and [len(x[0]) for x in batches] == [4, 4, 4]
    assert torch.equal(torch.cat([b[3] for b in batches]), given)
    assert batches[0][2].shape == (4, 1, 6, 3)


@pytest.mark.parametrize("harm", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_a_damaged_file_of_thoughts_is_named(data, tmp_path, harm):
    harm(tmp_path / "data" / THOUGHTS)
    with pytest.raises(InputError, match=f"{THOUGHTS}.*prepare it again"):
        TokenDataset(tmp_path / "data", "train")


@pytest.mark.parametrize("thoughts", [
    [(120, [1])], [(-1, [1])], [(3, [120])], [(3, [])], [(3, [-1])]])
def test_thoughts_that_cannot_be_of_this_text_are_refused(tmp_path, thoughts):
    """Whatever sums they have: nothing reads beyond the text or the vocabulary."""
    write_dataset(tmp_path / "x", "{}", 120, None, {"train": [range(120)], "val": [[1, 2]]}, {},
                  thoughts)
    with pytest.raises(InputError, match="holds no thoughts of this text"):
        TokenDataset(tmp_path / "x", "train")


def test_another_file_of_thoughts_is_other_data(data, tmp_path):
    write_dataset(tmp_path / "other", "{}", 120, None, {
        "train": np.arange(120).reshape(12, 10), "val": [[1, 2]]}, {}, [(0, [1, 2])])
    assert TokenDataset(tmp_path / "other", "train").fingerprint != data.fingerprint


# ---- a run


WARM = dict(fold_thoughts=40, warm_steps=5, max_steps=3, save_every=2, eval_every=3, keep=99,
            grad_accum=2, log_every=2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing stopped, all of whose states are kept."""
    out = tmp_path_factory.mktemp("warm") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "in_host_memory", lambda tensors: None)
        assert start(out, **WARM) == 0
    return out


def test_a_run_writes_warms_and_thinks(straight):
    assert [(r["kind"], r["step"]) for r in rows(straight)] == [
        ("pretrain", 2), ("pretrain", 3), ("warm", 2), ("warm", 4), ("warm", 5), ("eval", 0),
        ("think", 2), ("think", 3), ("eval", 3), ("end", 3)]
    assert all(0 < r["nll_given"] < 4 for r in rows(straight, "warm"))


@pytest.mark.parametrize("n", [3, 4, 6, 8, 9])  # the last of pre-training, three of warm, thinking
def test_a_signal_and_resume_are_as_if_nothing_had_been(straight, tmp_path, monkeypatch, n):
    out, command = tmp_path / "x", dict(WARM, resume="auto")
    with monkeypatch.context() as patch:
        before_call(patch, script, "train_step", n, kill(signal.SIGTERM))
        assert start(out, **command) == 143
    assert start(out, **command) == 0
    assert learned(out) == learned(straight)


def test_every_state_leads_to_the_same_end(straight, tmp_path):
    names = [x.name for x in States(straight / "state", 1).folders()]
    assert {f"step-{n:06d}" for n in (3, 5, 7, 8, 10, 11)} <= {*names}
    for name in names:
        shutil.copytree(straight, tmp_path / name)
        assert script.main(["--resume", str(tmp_path / name / "state" / name)]) == 0
        assert learned(tmp_path / name) == learned(straight), name


def test_another_run_may_warm_the_model_of_one_and_count_on(straight, tmp_path):
    given = dict(model_path=str(straight), fold_thoughts=40, warm_steps=2, max_steps=2)
    assert start(tmp_path / "y", **given) == 0
    assert [(r["kind"], r["step"]) for r in rows(tmp_path / "y")] == [
        ("warm", 4), ("warm", 5), ("eval", 3), ("think", 4), ("think", 5), ("eval", 5), ("end", 5)]


def test_what_cannot_be_is_refused(tmp_path, capsys):
    check_refused(capsys, start(tmp_path / "x", warm_steps=2), "were given no thoughts to "
                  "start from; set fold_thoughts")
    assert not (tmp_path / "x" / "base").exists()  # before pre-training


def test_the_corpus_gives_the_steps_of_training_problems_alone(tmp_path):
    cfg = small(fold_thoughts=60, fold_worked_frac=0.0)
    corpus = fold.Corpus.of(cfg)
    corpus.prepare(tmp_path / "d", 5000, 200)
    data = TokenDataset(tmp_path / "d", "train")
    text = fold.decode(data.windows([0], data.n_tokens)[0][0].tolist(), 1)
    squares = fold.latin_squares(0)
    assert len(data.thoughts.positions) == 60
    for n, (position, line) in enumerate(zip(data.thoughts.positions, text.splitlines())):
        start_ = text.rindex("\n", 0, position) + 1 if "\n" in text[:position] else 0
        problem = text[start_:position]
        assert text[position] == "=" and line.startswith(problem + "=")
        assert not fold.held_out(problem)
        steps = fold.decode(data.thoughts.of(n).tolist(), 1)
        assert steps == fold.solve(problem, squares) and steps[-1] == line[-1]


# ---- data/prepare.py --thoughts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path, tokenizer, capsys):
    return runner(tmp_path, tokenizer, capsys)


def write_rows(path, rows):
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def row(document, position, thought):
    return {"document": document, "position": position, "thought": thought}


def read_back(folder):
    """[(text before, thought)] of a prepared folder, decoded, document by document."""
    data = TokenDataset(folder, "train")
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    tokens, docs = (x[0].tolist() for x in data.windows([0], data.n_tokens))
    found = []
    for n, position in enumerate(data.thoughts.positions.tolist()):
        own = [t for t, d in zip(tokens[:position + 1], docs) if d == docs[position]]
        found.append((tokenizer.decode(own), tokenizer.decode(data.thoughts.of(n).tolist())))
    return found


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_thought_stands_after_the_characters_before_it(run, tmp_path, name):
    """At a token's end, inside a token, at the end of the text and between accents; in order."""
    texts = [*sentences(1, 60), "the cat sat on a mat, na\u00efve \u732b and all"]
    train = [t for t in texts if split_of(t, 0.2) == "train"]
    val = next(t for t in texts if t not in train)
    cat = texts[-1] if texts[-1] in train else None
    assert cat, "another sentence is needed"
    word = cat.index("sat") + 3  # "the cat sat|"
    given = [row(train[3], len(train[3]), " so it ends"), row(cat, word, " who?"),
             row(cat, word + 1, " again"), row(cat, cat.index("\u732b") + 1, "a cat"),
             row(val, 3, "not used")]
    source = tmp_path / "in"
    write_jsonl(source / "a.jsonl", texts)
    file = write_rows(source / name, given)  # which is no text, though it lies there
    status, out, _ = run("--input", source, "--thoughts", file, "--val_fraction", 0.2)
    assert status == 0 and "left out" not in out
    assert "4 thoughts to train on; 1 of held-out documents are not used" in out
    assert sorted(read_back(tmp_path / "out")) == sorted([
        (train[3], " so it ends"), (cat[:word], " who?"), (cat[:word], " again"),
        (cat[:cat.index("\u732b") + 1], "a cat")])


def test_a_beginning_of_text_token_moves_them(run, tmp_path, tokenizer):
    own = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    own.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (tmp_path / "bos").mkdir()
    own.save(str(tmp_path / "bos" / "tokenizer.json"))
    texts = sentences(1, 40)
    text = next(t for t in texts if split_of(t, 0.2) == "train")
    file = write_rows(tmp_path / "t.jsonl", [row(text, 0, "first"), row(text, len(text), "last")])
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run("--input", source, "--thoughts", file, "--val_fraction", 0.2, "--tokenizer",
               tmp_path / "bos")[0] == 0
    assert read_back(tmp_path / "out") == [("", "first"), (text, "last")]


GOOD = row(sentences(1, 1)[0], 4, "a thought")
BAD = {
    "no JSON": ("{", "is no JSON object"),
    "a list": ([1], "is no JSON object"),
    "no document": ({"position": 1, "thought": "x"}, "no text in 'document'"),
    "an index": (row(3, 1, "x"), "no text in 'document'"),
    "no thought": (row("abc", 1, ""), "no text in 'thought'"),
    "no position": ({"document": "abc", "thought": "x"}, "has None in 'position'"),
    "a truth": (row("abc", True, "x"), "has True in 'position'"),
    "a share": (row("abc", 0.5, "x"), "has 0.5 in 'position'"),
    "beyond": (row("abc", 4, "x"), "has 4 in 'position', which counts the characters before the "
               "thought, of 3 there are"),
    "nothing before": (row(sentences(1, 1)[0], 0, "x"), "before its document's first token"),
    "another text": (row("another text", 3, "x"), "names a document that the prepared text does"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_line_is_one_sentence(run, tmp_path, name):
    """Counted beside good ones, refused with --strict, and where nothing else is there."""
    bad, words = BAD[name]
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 40))
    assert split_of(GOOD["document"], 0.2) == "train"
    args = ("--input", source, "--val_fraction", 0.2, "--thoughts")
    both = write_rows(tmp_path / "both.jsonl", [GOOD, bad])
    status, out, _ = run(*args, both)
    assert status == 0 and words in out and f"{both}, line 2" in out and "1 times" in out
    assert "1 thoughts to train on" in out
    assert_refused(run(*args, both, "--strict", out="strict"), words, "line 2")
    alone = write_rows(tmp_path / "alone.jsonl", [bad])
    assert_refused(run(*args, alone, out="alone"), words, "--thoughts")
    if name in ("nothing before", "another text"):  # known only when all is tokenized: which stays
        assert run(*args, both, out="alone")[0] == 0


def test_files_that_hold_nothing_are_named(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 40))
    args = ("--input", source, "--thoughts")
    assert_refused(run(*args, tmp_path / "none.jsonl"), "--thoughts", "No such file")
    assert_refused(run(*args, write_rows(tmp_path / "e.jsonl", [])), "holds no thought")
    (tmp_path / "z.jsonl.gz").write_bytes(b"no gzip")
    assert_refused(run(*args, tmp_path / "z.jsonl.gz"), "--thoughts", "cannot be read")


def test_other_thoughts_are_other_data(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sentences(1, 40))
    args = ("--input", source, "--val_fraction", 0.2)
    file = write_rows(tmp_path / "t.jsonl", [GOOD])
    assert run(*args, "--thoughts", file)[0] == 0
    status, out, _ = run(*args, "--thoughts", file)
    assert status == 0 and "already prepared" in out
    assert_refused(run(*args), "other --thoughts", "delete that folder")
    write_rows(file, [GOOD, GOOD])
    assert_refused(run(*args, "--thoughts", file), "other --thoughts")
    assert run(*args, out="plain")[0] == 0
    assert_refused(run(*args, "--thoughts", file, out="plain"), "other --thoughts")


def test_interrupted_preparation_ends_with_the_same_thoughts(run, tmp_path, monkeypatch):
    texts = sentences(1, 60)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    file = write_rows(tmp_path / "t.jsonl", [row(t, 5, f"thought {n}")
                                             for n, t in enumerate(texts)])
    args = ("--input", source, "--val_fraction", 0.2, "--thoughts", file)
    monkeypatch.setattr(prepare, "BATCH_CHARS", 500)
    assert run(*args, out="straight")[0] == 0

    def stop(*_):
        raise KeyboardInterrupt
    for name, n in (("commit", 3), ("fill_short_split", 1), ("_write_thoughts", 1)):
        with monkeypatch.context() as patch:
            before_call(patch, prepare.DatasetWriter, name, n, stop)
            assert run(*args, out=name)[0] == 130
        assert not (tmp_path / name).exists()
        assert run(*args, out=name)[0] == 0
        for part in (THOUGHTS, "meta.json", "train.bin", "val.docs.npy"):
            assert (tmp_path / name / part).read_bytes() == (
                tmp_path / "straight" / part).read_bytes(), (name, part)
        assert not (tmp_path / f"{name}.partial").exists()


def test_a_prepared_folder_trains(run, tmp_path, tokenizer):
    """All the way, as a user does it."""
    texts = sentences(1, 60)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    file = write_rows(tmp_path / "t.jsonl", [row(t, len(t) // 2, " mat trees") for t in texts])
    assert run("--input", source, "--val_fraction", 0.3, "--thoughts", file, "--strict")[0] == 0
    config = dataclasses.replace(small(), data=str(tmp_path / "out"))
    command = [f"--data={tmp_path / 'out'}", "--hidden_size=16", "--n_heads=2", "--n_kv_heads=1",
               "--intermediate_size=32", "--pretrain_steps=2", "--batch_size=2",
               "--max_length=20", "--eval_windows=4", "--threads=1", "--warm_steps=20",
               "--max_steps=1", "--log_every=5", f"--out_dir={tmp_path / 'x'}"]
    assert config.n_ahead and script.main(command) == 0
    learned_ = [r["nll_given"] for r in rows(tmp_path / "x", "warm")]
    assert learned_[-1] < learned_[0]
