"""GSM8K and CommonsenseQA: against scores worked out by hand, and against the official functions'
own arithmetic, derived anew with one plain forward per token, for two kinds of tokenizer."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import nn

from nanoqstar import InputError, parallel, tasks
from nanoqstar.attention import dense
from nanoqstar.quietstar import uniforms
from nanoqstar.tasks import answer_scores, compare, encode_item, interval, read_questions

K, S = 5, 3
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
QUESTIONS = [("Tom has 3 eggs, and buys 15 more. How many?", "3+15=18 <<3+15=18>>\n#### 18"),
             ("How much is 2 * 617?", "It is\n#### 1,234"),
             ("What is 3 - 8 degrees?\nA: this is part of the question", "#### -5"),
             ("Seven " + "small birds sang, " * 70 + "how many?", "7 of them #### 7"),
             ("Café \U0001f600 costs?", "#### 1090")]
CHOICES = [("Where do cats sleep?", ["mat", "tree", "bridge", "stone", "A"], "A"),
           ("Who sings?", ["cats", "birds", "stones", "A: all", "none"], "E"),
           ("What is " + "very " * 300 + "old?", ["mat", "tree", "bridge", "stone", "egg"], "C")]


def mistral_like():
    """SentencePiece's BPE with byte fallback: a space token, `<s>` before a text, single digits."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁",
             *(chr(i) for i in range(33, 127))]
    merges = [("▁", c) for c in "ABCDEaths"] + [("t", "h"), ("▁t", "h"), ("i", "n"), ("e", "r")]
    words += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges,
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def trained(pretokenizers):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pretokenizers)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [q + "\nA: 18\nA: 18\n(A) x\n" for q, _ in QUESTIONS] + [" A B C D E\n\n"] * 3
    tokenizer.train_from_iterator(texts, BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def qwen_like():
    """Byte-level BPE whose pre-tokenizer splits digits; nothing before a text."""
    return trained([pre_tokenizers.Split(Regex(QWEN), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {"mistral": mistral_like(), "qwen": qwen_like()}


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """{task: a file in the published schema}."""
    return {
        "gsm8k": write(tmp_path / "gsm8k.jsonl",
                       [{"question": q, "answer": a} for q, a in QUESTIONS]),
        "commonsense_qa": write(tmp_path / "csqa.jsonl.gz", [
            {"id": "x", "question": q, "question_concept": "y", "answerKey": key,
             "choices": {"label": list("ABCDE"), "text": texts}} for q, texts, key in CHOICES])}


# ---- the official arithmetic, derived anew


def official_rows(ids, tokenizer, name):
    """Places j of the tokens that count, as `compute_metrics` finds them: by decoding ever shorter
    texts until one has lost its last marker; and the ids among which they are renormalised."""
    digits = {tokenizer.decode([i]): i for i in range(tokenizer.get_vocab_size())
              if len(tokenizer.decode([i])) == 1 and tokenizer.decode([i]).isdigit()}
    newline = next(i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]) == "\n"
                   and i in ids)
    letters = [i for c in "ABCDE" for i in [tokenizer.token_to_id("▁" + c)
                                            or tokenizer.token_to_id("Ġ" + c)]]
    allowed = [digits[c] for c in "0123456789"] if name == "gsm8k" else letters
    marker = "\nA:"
    n = tokenizer.decode(ids).count(marker)
    i = next(i for i in range(len(ids) - 1, 0, -1) if tokenizer.decode(ids[:i]).count(marker) < n)
    return [j for j in range(i, len(ids) - 1) if ids[j + 1] in (*allowed, newline)], [
        *allowed, newline]


def naive(model, text, j, u):
    """Base state of text[:j + 1], and the mixed one after a thought drawn by u: plain forwards, a
    whole one for each token."""
    def last(vectors, still=0):
        n = len(vectors)
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        places = torch.arange(n) - model.reread * (torch.arange(n) > j).long()
        places[-1] -= model.reread * still
        return model.lm(vectors[None], places, dense(causal))[0, -1]

    parts = model.lm.embed(torch.tensor(text[:j + 1]))
    base = last(parts)
    parts = torch.cat((parts, (model.start_embedding + model.reread * parts[-1])[None]))
    for draw in u.tolist():
        logits = (model.lm.head_weight @ last(parts)).masked_fill(model.banned, -torch.inf)
        cdf = (logits / model.thought_temperature).softmax(-1).cumsum(-1)
        token = int((cdf <= draw * cdf[-1]).sum())
        parts = torch.cat((parts, model.lm.embed(torch.tensor([token]))))
    talk = last(torch.cat((parts, (model.end_embedding + model.reread * parts[-1])[None])), 1)
    w = nn.Sequential(*model.mixing_head)(torch.cat((base, talk)))
    return base, (1 - w) * base + w * talk


def official_text(name, n):
    if name == "gsm8k":
        question, answer = QUESTIONS[n]
        return "Q: " + question + "\nA:" + answer.split("####")[-1] + "\n"
    question, texts, key = CHOICES[n]
    listed = "\n".join(f"({label}) {text}" for label, text in zip("ABCDE", texts))
    return f"Q: {question}\n{listed}\nA: {key}\n"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", tasks.TASKS)
@torch.no_grad()
def test_answer_prob_is_the_official_one(make_model, files, reread, name, kind):
    tokenizer = TOKENIZERS[kind]
    model = make_model(vocab_size=tokenizer.get_vocab_size(), thought_temperature=1.3,
                       reread=reread)
    questions = read_questions(name, tokenizer, files[name])
    scores = answer_scores(model, questions, K, 2, seed=4, batch_size=3)
    n_items = len(QUESTIONS if name == "gsm8k" else CHOICES)
    assert scores.shape == (n_items, 3, 2)
    for n in range(n_items):
        ids = tokenizer.encode(official_text(name, n)).ids  # with <s> where it is the default
        assert (ids[0] == 1) == (kind == "mistral")
        ids = ids[-256:]
        rows, allowed = official_rows(ids, tokenizer, name)
        draws = uniforms(4, "eval", 0, [n], (2, len(rows), S))[0].double()
        for sample in range(2):
            expected, choices = torch.ones(2, dtype=torch.float64), []
            for r, j in enumerate(rows):
                for way, state in enumerate(naive(model, ids, j, draws[sample, r])):
                    p = (model.lm.head_weight @ state).softmax(-1)
                    p = p[allowed] / p[allowed].sum()
                    expected[way] *= p[allowed.index(ids[j + 1])]
                    choices.append(int(p[:-1].argmax()) == allowed.index(ids[j + 1]))
            assert scores[n, 0, 0].item() == pytest.approx(expected[0].item(), rel=1e-9)
            assert scores[n, 1 + sample, 0].item() == pytest.approx(expected[1].item(), rel=1e-9)
            assert scores[n, [0, 1 + sample], 1].tolist() == choices[:2]
    assert (scores[:, 1, 0] != scores[:, 2, 0]).all()


def test_which_tokens_count(files):
    """Digits and the newline; neither space nor comma nor minus. The end of a long text is kept."""
    for kind, tokenizer in TOKENIZERS.items():
        items = read_questions("gsm8k", tokenizer, files["gsm8k"]).items
        assert [item.targets for item in items] == [
            [1, 8, 10], [1, 2, 3, 4, 10], [5, 10], [7, 10], [1, 0, 9, 0, 10]]
        for item, (_, answer) in zip(items, QUESTIONS):
            said = tokenizer.decode(item.ids[item.start:])
            assert said.strip(" ") == answer.split("#### ")[1] + "\n", kind
        assert [len(item.ids) == 256 for item in items] == [False, False, False, True, False]
        assert tokenizer.decode(items[3].ids).endswith("sang, how many?\nA: 7\n")


# ---- by hand


def constant(make_model, tokenizer, weights):
    """A model that predicts the same everywhere: each id in proportion to its weight."""
    model = make_model(vocab_size=tokenizer.get_vocab_size(), tied=False)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.zero_()
        model.lm.model.embed_tokens.weight[:, 0] = 1e3
        model.start_embedding.zero_()[0] = 1e3
        model.end_embedding.zero_()[0] = 1e3
        model.lm.model.norm.weight[0] = 1.0
        size = model.lm.config.hidden_size**0.5  # of the normed first number, but for eps
        model.lm.lm_head.weight[:, 0] = weights.double().log() / size
    return model


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_by_hand(make_model, files, kind):
    """Digit d weighs d + 1, the newline 5, all else 100 and does not matter: 60 in all."""
    tokenizer = TOKENIZERS[kind]
    questions = read_questions("gsm8k", tokenizer, files["gsm8k"])
    weights = torch.full((tokenizer.get_vocab_size(),), 100.0)
    weights[questions.allowed] = torch.tensor([*range(1, 11), 5.0])
    scores = answer_scores(constant(make_model, tokenizer, weights), questions, K, 1, 0, 16)
    expected = [2 * 9 * 5 / 60**3, 2 * 3 * 4 * 5 * 5 / 60**5, 6 * 5 / 60**2, 8 * 5 / 60**2,
                2 * 1 * 10 * 1 * 5 / 60**5]
    for way in range(2):
        assert scores[:, way, 0].tolist() == pytest.approx(expected, rel=1e-5)

    questions = read_questions("commonsense_qa", tokenizer, files["commonsense_qa"])
    weights[questions.allowed] = torch.tensor([1.0, 2, 3, 4, 10, 5])  # 25; E is the likeliest
    scores = answer_scores(constant(make_model, tokenizer, weights), questions, K, 1, 0, 16)
    assert scores[:, 1, 0].tolist() == pytest.approx([5 / 625, 50 / 625, 15 / 625], rel=1e-5)
    assert scores[:, 1, 1].tolist() == [0, 1, 0]


def test_neither_batches_nor_samples_nor_ranks_matter(make_model, files, monkeypatch):
    tokenizer = TOKENIZERS["qwen"]
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    questions = read_questions("gsm8k", tokenizer, files["gsm8k"])
    whole = answer_scores(model, questions, K, 3, 1, 5)
    for n_samples, batch_size in ((3, 1), (1, 2)):
        scores = answer_scores(model, questions, K, n_samples, 1, batch_size)
        torch.testing.assert_close(scores, whole[:, :1 + n_samples], rtol=1e-9, atol=0)
    plain = answer_scores(model, questions, 0, 3, 1, 2)
    torch.testing.assert_close(plain, whole[:, :1], rtol=1e-9, atol=0)
    assert not torch.equal(answer_scores(model, questions, K, 3, 2, 5)[:, 1:], whole[:, 1:])
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "collect", lambda mine, n: mine)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(answer_scores(model, questions, K, 3, 1, 5))
    assert [len(part) for part in parts] == [2, 3]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=0)


def test_nobody_thinks_where_nothing_is_asked(make_model, files, monkeypatch):
    """The cost: each text token once, and K for each thought of a token that counts; no more but
    what fills batches up."""
    tokenizer = TOKENIZERS["qwen"]
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    questions = read_questions("gsm8k", tokenizer, files["gsm8k"])
    computed, forward = [], model.lm.forward
    monkeypatch.setattr(model.lm, "forward", lambda x, *rest: (
        computed.append(x.shape[0] * x.shape[1]), forward(x, *rest))[1])
    answer_scores(model, questions, K, 2, 0, batch_size=1)
    needed = sum(len(item.ids) - 1 + 2 * K * len(item.rows) for item in questions.items)
    assert sum(computed) == needed
    assert len(computed) == len(questions.items) * (S + 1)


# ---- what is refused


def refusal(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    sentence = str(caught.value)
    assert "\n" not in sentence.strip()
    return sentence


def test_tokenizers_that_cannot_be_scored(files):
    gpt2 = trained([pre_tokenizers.ByteLevel(add_prefix_space=False)])  # `18` becomes one token
    assert gpt2.encode(" 18").tokens == ["Ġ18"]
    assert "'18' one token for each of 0123456789" in refusal(
        read_questions, "gsm8k", gpt2, files["gsm8k"])
    assert read_questions("commonsense_qa", gpt2, files["commonsense_qa"]).allowed
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abc=()\n")}))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for name, file in files.items():
        assert f"{name}: the tokenizer cannot encode" in refusal(
            read_questions, name, letters, file)
    bare = qwen_like()
    bare.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert "0 and the newline after it must be a token each" in refusal(
        read_questions, "gsm8k", bare, files["gsm8k"])


@pytest.mark.parametrize(("name", "row", "word"), [
    ("gsm8k", {"question": "x", "answer": "no number"}, "a text with ####"),
    ("gsm8k", {"question": "x"}, "question and answer"),
    ("gsm8k", ["x"], "question and answer"),
    ("commonsense_qa", {"question": "x", "answerKey": "", "choices": {
        "label": ["A"], "text": ["x"]}}, "the test split has none"),
    ("commonsense_qa", {"question": "x", "answerKey": "A", "choices": ["x"]}, "choices {label, "),
    ("gsm8k", {"question": None, "answer": "#### 7"}, "question and answer"),
    ("gsm8k", {"question": "x", "answer": "#### none"}, "and a number"),
    ("commonsense_qa", {"question": "x", "answerKey": "AB", "choices": {
        "label": ["AB", "C"], "text": ["x", "y"]}}, "A to E"),
    ("commonsense_qa", {"question": "x", "answerKey": "B", "choices": {
        "label": ["A", "B"], "text": ["x"]}}, "choices {label, "),
    ("commonsense_qa", {"question": "x", "answerKey": "B", "choices": {
        "label": "AB", "text": "xy"}}, "choices {label, ")])
def test_rows_of_another_schema(tmp_path, name, row, word):
    file = write(tmp_path / "x.jsonl", [row])
    sentence = refusal(tasks.read_texts, name, file)
    assert f"{file}, row 1: {name} needs " in sentence
    assert word in sentence


def test_files_that_cannot_be_read(tmp_path):
    for name, content, word in (("a.jsonl", b"{", "cannot be read"), ("b.jsonl", b"", "no questi"),
                                ("c.jsonl.gz", b"x", "cannot be read"), ("d.jsonl", None, "No su"),
                                ("e.parquet", b"x", "cannot be read")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        if name != "e.parquet" or pytest.importorskip("pyarrow"):
            assert word in refusal(tasks.read_texts, "gsm8k", str(tmp_path / name))
    assert "not a plain file" in refusal(tasks.read_texts, "gsm8k", str(tmp_path))


def test_an_answer_that_is_not_there():
    tokenizer = TOKENIZERS["qwen"]
    allowed = tasks.allowed_ids(tokenizer, "gsm8k")
    assert "answer 'many'" in refusal(
        encode_item, tokenizer, "Q: x\nA:", " many\n", allowed, "gsm8k")


# ---- where questions come from


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet_has_the_same_rows(tmp_path, files, zipped):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = tasks.read_rows(files["commonsense_qa"])
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    if zipped:
        path = tmp_path / "y.parquet.gz"
        path.write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    assert tasks.read_texts("commonsense_qa", str(path)) == tasks.read_texts(
        "commonsense_qa", files["commonsense_qa"])


def test_the_hubs_file_is_pinned_and_checked(files, monkeypatch):
    asked = []

    def fetch(call, name, *args, **options):
        asked.append((name, *args, options))
        return files["gsm8k"]

    monkeypatch.setattr(tasks, "fetch", fetch)
    assert "not the file that openai/gsm8k has published" in refusal(tasks.read_texts, "gsm8k")
    with open(files["gsm8k"], "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    monkeypatch.setitem(tasks.TASKS, "gsm8k", tasks.TASKS["gsm8k"]._replace(sha256=digest))
    assert len(tasks.read_texts("gsm8k")) == len(QUESTIONS)
    assert asked[-1] == ("openai/gsm8k", "main/test-00000-of-00001.parquet", {
        "repo_type": "dataset", "revision": "740312add88f781978c0658806c59bc2815b9866"})


def test_limit_and_ranks(files, monkeypatch):
    assert len(read_questions("gsm8k", TOKENIZERS["qwen"], files["gsm8k"], 2).items) == 2
    monkeypatch.setattr(parallel, "size", lambda: 6)
    assert "6 processes cannot share 5 questions" in refusal(
        read_questions, "gsm8k", TOKENIZERS["qwen"], files["gsm8k"])


# ---- differences


def test_compare_is_paired_and_its_interval_that_of_the_mean():
    rng = np.random.default_rng(3)
    base = rng.random(400)
    gain = 0.05 + 0.02 * rng.standard_normal((2, 400))  # far smaller than items differ
    found = compare(torch.tensor(np.stack((base, *(base + gain))).T))
    assert found["base"] == pytest.approx(base.mean())
    assert found["thoughts"] == pytest.approx((base + gain.mean(0)).mean())
    assert found["difference"] == pytest.approx(gain.mean())
    assert found["spread"] == pytest.approx(abs(gain[0].mean() - gain[1].mean()) / 2**0.5)
    for name, values in (("base_interval", base), ("difference_interval", gain.mean(0))):
        half = 1.96 * values.std(ddof=1) / 400**0.5
        assert found[name] == pytest.approx([values.mean() - half, values.mean() + half],
                                            abs=half / 8)
    assert json.loads(json.dumps(found)) == found
    alone = compare(torch.tensor(base)[:, None])
    assert alone.keys() == {"base", "base_interval"}
    assert compare(torch.rand(5, 2))["spread"] is None


def test_an_interval_is_over_items_and_repeats_itself():
    values = np.repeat([0.0, 1.0], 50)
    low, high = interval(values)
    assert (low, high) == tuple(interval(values))
    assert 0.38 <= low <= 0.42
    assert 0.58 <= high <= 0.62


def test_tables():
    found = {"base": 0.059, "base_interval": [0, 1], "thoughts": 0.109, "thoughts_interval": [0, 1],
             "difference": 0.05, "difference_interval": [0.042, 0.058], "spread": 0.002}
    said = tasks.table("gsm8k", {"answer_prob": found}).splitlines()
    assert said[0] == "gsm8k"
    assert said[1].split() == ["base", "thoughts", "difference", "95%", "interval", "spread"]
    assert said[2].split() == ["answer_prob", "5.90%", "10.90%", "+5.00%", "+4.20%", "..",
                               "+5.80%", "0.20%"]
    assert said[2].index("10.90%") + 6 == said[1].index("thoughts") + 8
    assert said[2].index("0.20%") == said[1].index("spread")
    assert tasks.table("x", {"maj@1": {"base": 0.5}}).splitlines()[1:] == [
        "                 base", "maj@1          50.00%"]
    assert tasks.line("gsm8k", {"n": 3, "answer_prob": found}) == (
        "; gsm8k (n=3): answer prob 5.9% -> 10.9%")


def test_the_official_tokens_of_qwen():
    """Which ids count are read off the tokenizer: here, one with the official ids' very names."""
    stub = SimpleNamespace(allowed=tasks.allowed_ids(TOKENIZERS["qwen"], "commonsense_qa"))
    words = [TOKENIZERS["qwen"].id_to_token(i) for i in stub.allowed]
    assert words == ["ĠA", "ĠB", "ĠC", "ĠD", "ĠE", "Ċ"]
    words = [TOKENIZERS["mistral"].id_to_token(i)
             for i in tasks.allowed_ids(TOKENIZERS["mistral"], "gsm8k")]
    assert words == [*"0123456789", "<0x0A>"]
