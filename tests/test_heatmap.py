"""The heat map: figures against forwards of their own, colours by hand, odd tokenizers."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import prepare
from nanoqstar.evaluate import score_text
from nanoqstar.heatmap import (
    HALF,
    N_LIKELIEST,
    Seen,
    Window,
    heat_map,
    likeliest,
    named,
    percent,
    pieces,
    shade,
    think,
    visible,
)
from nanoqstar.quietstar import uniforms

A, T, S, P = 3, 9, 2, 2


@pytest.fixture(scope="module")
def byte_level():
    return prepare.train_tokenizer(300, ["the cat sat on a mat, and the hat"] * 20)


def sentencepiece(decoder):
    """Bytes for what is unknown, spaces as in sentencepiece, as Llama's and Mistral's."""
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": 1 + i for i in range(256)}, "▁": 257, "a": 258,
                  "b": 259, "▁a": 260}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>",
                                     byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return tokenizer


LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                           decoders.Strip(" ", 1, 0)])


# ---- tokens


def test_a_character_of_several_tokens_is_one_unit(byte_level):
    text = "the €at 🙂 é\n"
    ids = byte_level.encode(text).ids
    found = pieces(byte_level, ids)
    assert "".join(piece for _, piece in found) == text
    assert sum(n for n, _ in found) == len(ids)
    assert {piece: n for n, piece in found if n > 1} == {"€": 3, " 🙂": 5, "é": 2} or (
        {"🙂": 4, "é": 2, "€": 3}.items() <= {piece.strip(): n for n, piece in found}.items())
    assert all(HALF not in piece for _, piece in found)


def test_half_a_character_stands_alone_and_hides_nothing(byte_level):
    ids = byte_level.encode("🙂the").ids
    cut = pieces(byte_level, ids[1:])  # its last three bytes, then text
    assert [n for n, _ in cut] == [1] * len(cut)
    assert [piece for _, piece in cut][:3] == [HALF] * 3
    assert "".join(piece for _, piece in cut[3:]) == "the"
    assert pieces(byte_level, ids[:2]) == [(1, HALF), (1, HALF)]  # its first two, at the end
    assert named(byte_level, ids[-1], ids[0]) == f"{HALF}{ids[0]}"


@pytest.mark.parametrize("decoder", [LLAMA, decoders.Metaspace()], ids=["llama", "metaspace"])
def test_spaces_at_the_start_are_kept(decoder):
    tokenizer = sentencepiece(decoder)
    ids = [260, 259, 260, 257, 258]  # ▁a b ▁a ▁ a
    assert [piece for _, piece in pieces(tokenizer, ids)] == [" a", "b", " a", " ", "a"]
    assert named(tokenizer, 259, 260) == "<i>·</i>a"


def test_bytes_of_sentencepiece_are_joined():
    ids = [259, *(1 + byte for byte in "é".encode()), 260]
    assert pieces(sentencepiece(LLAMA), ids) == [(1, "b"), (2, "é"), (1, " a")]


def test_what_is_visible():
    assert visible("a b\n\t<i>&\u202e") == (
        "a<i>·</i>b<i>↵</i><i>→</i>&lt;i&gt;&amp;\\u202e")
    assert [percent(p) for p in (0, 1e-5, 0.004, 0.5, 1)] == [
        "0%", "&lt;0.1%", "0.4%", "50%", "100%"]


# ---- figures


@pytest.fixture
def thought_about(make_model, make_text):
    """One window of two documents, its evaluation, and what was seen of it; float64."""
    model, (text, docs) = make_model(), make_text(2, T + A)
    u = uniforms(3, "eval", 0, [0], (P, T, S))
    one = think(model, text[1:], docs[1:], u, model.rollout)
    scores = score_text(model, text[1:], docs[1:], S + 2, A, seed=3)
    return model, (text[1:], docs[1:]), one, scores


def test_the_first_pass_is_the_evaluations(thought_about):
    _, (text, docs), one, scores = thought_about
    assert one.ids == text[0, :T + 1].tolist()
    assert one.valid == (docs[0, 1:T + 1] == docs[0, :T]).tolist() and not all(one.valid)
    assert one.thoughts[0] == scores.thoughts[0].tolist() != one.thoughts[1]
    for ours, theirs in ((one.base_lp, scores.base_lp[0]), (one.mixed_lp[0], scores.mixed_lp[0]),
                         (one.reward[0], scores.reward[0]), (one.mix[0], scores.mix[0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_a_whole_softmax(thought_about, monkeypatch):
    model, (text, docs), one, _ = thought_about
    monkeypatch.setattr("nanoqstar.head.CHUNK_LOGITS", {"cpu": 2 * 2 * 61})  # two positions each
    states = model.score(text, docs, torch.tensor(one.thoughts)[None])
    mixed = (states.mixed[0, :, :, 0] @ model.lm.head_weight.T).softmax(-1).mean(0)
    base = (states.base[0, :T] @ model.lm.head_weight.T).softmax(-1)
    again = likeliest(states.mixed[0, :, :, 0], model.lm.head_weight)
    for found, probs in ((one.without, base), (one.having, mixed), (again, mixed)):
        top = probs.topk(N_LIKELIEST)
        assert [[i for i, _ in row] for row in found] == top.indices.tolist()
        assert [p for row in found for _, p in row] == pytest.approx(top.values.flatten().tolist())


def test_the_papers_opacity():
    """Nothing up to the median |gain|, linear, all from the 95th percentile on."""
    assert [shade(g, 1.0, 3.0) for g in (0.5, -1.0, 2.0, -2.5, 3.0, -9.0)] == [
        0, 0, 0.5, 0.75, 1, 1]
    assert shade(0.0, 0.0, 0.0) == 0


def test_colours_and_details_by_hand(byte_level):
    """Five tokens with gains .1 -.2 .3 -.4 (mean over passes), the first without a thought."""
    ids = byte_level.encode("cat, hat sat mat").ids
    assert len(ids) == 5
    gains = torch.tensor([0.1, -0.2, 0.3, -0.4])
    some = [[(5, 0.5), (6, 0.25)]] * 4
    window = Window(ids[:5], [True] * 4, [[[7, 8]] * 4, [[9, 10]] * 4], torch.full((4,), -2.0),
                    torch.stack((gains - 2.0 + 0.05, gains - 2.0 - 0.05)), torch.zeros(2, 4),
                    torch.full((2, 4), 0.5), some, some)
    page, low, high = heat_map(Seen(1, byte_level, None, [window]))
    assert (low, high) == pytest.approx((0.25, 0.385))
    tokens = re.findall(r'<span class="t (\w)"(?: style="--a:([\d.]+)")? id="(\w+)"', page)
    assert tokens == [("g", "", "t1"), ("y", "", "t2"), ("g", f"{0.05 / (high - low):.2f}", "t3"),
                      ("y", "1.00", "t4")]
    assert page.count('tabindex="0"') == page.count('role="tooltip"') == 4
    first = page[page.index('id="d1"'):page.index('id="t2"')]
    assert "14% → 15%" in first  # exp(-2), and the mean of exp(-1.85) and exp(-1.95)
    assert first.count("+0.150") == 1 and first.count("+0.050") == 1 and first.count("+0.50") == 2


def test_positions_that_look_across_documents_have_no_thought(thought_about):
    _, _, one, _ = thought_about
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(61)}, unk_token="!"))
    tokenizer.decoder = decoders.Fuse()
    page, _, _ = heat_map(Seen(1, tokenizer, None, [one]))
    assert page.count('class="n"') == 1 + one.valid.count(False)
    assert page.count('role="tooltip"') == sum(one.valid)
