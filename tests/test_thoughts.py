"""The packed layout against matrices and lists written by hand."""

import pytest
import torch

from nanoqstar.thoughts import ThoughtLayout, dense_mask, visible

LAYOUT = ThoughtLayout(n_ahead=3, n_ahead_talk=2, n_passes=2, n_positions=3)

# x = text, s = start, t e y = t_1, end and x_{i+1}; of pass 0, then of pass 1
MASK = """
    xxxx s tey tey s tey tey s tey tey
x_0 1000 0 000 000 0 000 000 0 000 000
x_1 1100 0 000 000 0 000 000 0 000 000
x_2 1110 0 000 000 0 000 000 0 000 000
x_3 1111 0 000 000 0 000 000 0 000 000
s_0 1000 1 000 000 0 000 000 0 000 000
t_0 1000 1 100 000 0 000 000 0 000 000
e_0 1000 1 110 000 0 000 000 0 000 000
y_0 1000 1 111 000 0 000 000 0 000 000
t_0 1000 1 000 100 0 000 000 0 000 000
e_0 1000 1 000 110 0 000 000 0 000 000
y_0 1000 1 000 111 0 000 000 0 000 000
s_1 1100 0 000 000 1 000 000 0 000 000
t_1 1100 0 000 000 1 100 000 0 000 000
e_1 1100 0 000 000 1 110 000 0 000 000
y_1 1100 0 000 000 1 111 000 0 000 000
t_1 1100 0 000 000 1 000 100 0 000 000
e_1 1100 0 000 000 1 000 110 0 000 000
y_1 1100 0 000 000 1 000 111 0 000 000
s_2 1110 0 000 000 0 000 000 1 000 000
t_2 1110 0 000 000 0 000 000 1 100 000
e_2 1110 0 000 000 0 000 000 1 110 000
y_2 1110 0 000 000 0 000 000 1 111 000
t_2 1110 0 000 000 0 000 000 1 000 100
e_2 1110 0 000 000 0 000 000 1 000 110
y_2 1110 0 000 000 0 000 000 1 000 111
"""
BY_HAND = torch.tensor([[c == "1" for c in "".join(line.split()[1:])]
                        for line in MASK.strip().splitlines()[1:]])


def test_mask_by_hand():
    one_document = torch.zeros(1, 5, dtype=torch.long)
    assert torch.equal(dense_mask(LAYOUT.packing, one_document)[0, 0], BY_HAND)


def test_predicate_by_hand():
    """`visible` on its own, called with plain numbers, against the same matrix."""
    branch = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]  # (pass, offset)
    tokens = [(i, -1, -1, 0) for i in range(4)]
    tokens += [(i, *what, 0) for i in range(3) for what in [(-1, 0), *branch]]
    tokens = [tuple(map(torch.tensor, token)) for token in tokens]
    seen = [[bool(visible(query, key)) for key in tokens] for query in tokens]
    assert torch.equal(torch.tensor(seen), BY_HAND)


def test_documents_in_the_mask():
    """Text and groups see their own document's text only; a group is of its position's document."""
    docs = torch.tensor([[0, 0, 1, 1, 1], [4, 5, 5, 6, 6]])
    for mask, text in zip(dense_mask(LAYOUT.packing, docs)[:, 0], [
            # of x_0, x_1, x_2, x_3 and of the groups at 0, 1, 2
            ["1000", "1100", "0010", "0011", "1000", "1100", "0010"],
            ["1000", "0100", "0110", "0001", "1000", "0100", "0110"]], strict=True):
        rows = text[:4] + [row for row in text[4:] for _ in range(7)]
        assert torch.equal(mask[:, :4], torch.tensor([[c == "1" for c in row] for row in rows]))
        assert torch.equal(mask[:, 4:], BY_HAND[:, 4:])


def test_rope_positions_by_hand():
    """start at i+1, t_k at i+1+k, end at i+K, x_{i+k} at i+K+k."""
    assert LAYOUT.packing.rope_positions().tolist() == [
        0, 1, 2, 3,
        1, 2, 3, 4, 2, 3, 4,
        2, 3, 4, 5, 3, 4, 5,
        3, 4, 5, 6, 4, 5, 6]
    longer = ThoughtLayout(n_ahead=5, n_ahead_talk=3, n_passes=1, n_positions=2)
    assert longer.packing.rope_positions().tolist() == [  # start t_1 t_2 t_3 end x_1 x_2
        0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7, 8]
    assert longer.rollout_packing.rope_positions().tolist() == [  # start t_1 t_2
        0, 1, 2, 3, 1, 2, 3, 2, 3, 4]


def test_rope_positions_of_delimiters_that_reread_by_hand():
    """start at i, t_k at i+k, end at i+S, x_{i+k} at i+S+k."""
    layout = ThoughtLayout(n_ahead=5, n_ahead_talk=3, n_passes=1, n_positions=2, reread=True)
    assert layout.packing.rope_positions().tolist() == [  # start t_1 t_2 t_3 end x_1 x_2
        0, 1, 2, 3, 0, 1, 2, 3, 3, 4, 5, 1, 2, 3, 4, 4, 5, 6]
    assert layout.rollout_packing.rope_positions().tolist() == [  # start t_1 t_2
        0, 1, 2, 3, 0, 1, 2, 1, 2, 3]


def test_describe_by_hand():
    position, pass_, offset = LAYOUT.packing.describe()
    assert position.tolist() == [0, 1, 2, 3] + 7 * [0] + 7 * [1] + 7 * [2]
    assert pass_.tolist() == 4 * [-1] + 3 * [-1, 0, 0, 0, 1, 1, 1]
    assert offset.tolist() == 4 * [-1] + 3 * [0, 1, 2, 3, 1, 2, 3]


def test_pack_by_hand():
    """Text once, then each position's group: its thoughts, its end, the true tokens after it."""
    text = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    # (B, P, T, 1)
    thoughts = torch.tensor([[[31, 32, 33], [41, 42, 43]], [[51, 52, 53], [61, 62, 63]]])[..., None]
    ids, is_start, is_end = LAYOUT.pack(text, thoughts)
    assert ids.tolist() == [
        [10, 11, 12, 13, *(10, 31, 31, 11, 41, 41, 11), *(11, 32, 32, 12, 42, 42, 12),
         *(12, 33, 33, 13, 43, 43, 13)],
        [20, 21, 22, 23, *(20, 51, 51, 21, 61, 61, 21), *(21, 52, 52, 22, 62, 62, 22),
         *(22, 53, 53, 23, 63, 63, 23)]]
    assert is_start.nonzero()[:, 0].tolist() == [4, 11, 18]
    assert is_end.nonzero()[:, 0].tolist() == [6, 9, 13, 16, 20, 23]


def test_pack_with_longer_lookahead_by_hand():
    layout = ThoughtLayout(n_ahead=4, n_ahead_talk=3, n_passes=1, n_positions=2)
    text, thoughts = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[[[31, 32], [33, 34]]]])
    ids, is_start, is_end = layout.pack(text, thoughts)
    assert ids.tolist() == [[10, 11, 12, 13, 10, 31, 32, 32, 11, 12, 11, 33, 34, 34, 12, 13]]
    assert is_start.nonzero()[:, 0].tolist() == [4, 10]
    assert is_end.nonzero()[:, 0].tolist() == [7, 13]


def test_lookahead_of_one_packs_no_true_token():
    layout = ThoughtLayout(n_ahead=3, n_ahead_talk=1, n_passes=2, n_positions=2)
    ids, _, is_end = layout.pack(torch.tensor([[10, 11, 12]]),
                                 torch.tensor([[[[31], [32]], [[41], [42]]]]))
    assert ids.tolist() == [[10, 11, 10, 31, 31, 41, 41, 11, 32, 32, 42, 42]]
    assert is_end.nonzero()[:, 0].tolist() == [4, 6, 9, 11]


def test_split_by_hand():
    """Numbers 0 .. 24 stand for the packed tokens of row 0, 100 .. 124 for those of row 1."""
    packed = torch.stack((torch.arange(25), torch.arange(100, 125)))[..., None]  # (B, n_packed, 1)
    text, roots, branches = (x[..., 0] for x in LAYOUT.packing.split(packed))
    assert text.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103]]
    assert roots.tolist() == [[4, 11, 18], [104, 111, 118]]
    assert branches[0].tolist() == [[[5, 6, 7], [12, 13, 14], [19, 20, 21]],
                                    [[8, 9, 10], [15, 16, 17], [22, 23, 24]]]
    assert torch.equal(branches[1], branches[0] + 100)


def test_layout_is_read_off_the_shapes():
    assert ThoughtLayout.of(torch.zeros(5, 3 + 2), torch.zeros(5, 2, 3, 1)) == LAYOUT
    assert LAYOUT.packing.n_packed == 25
    assert LAYOUT.rollout_packing.n_packed == 4 + 3  # t_1 is never an input
    assert (LAYOUT.n_sampled, LAYOUT.n_text) == (1, 4)


@pytest.mark.parametrize("wrong", [dict(n_ahead=2), dict(n_ahead_talk=0), dict(n_passes=0),
                                   dict(n_positions=0)])
def test_impossible_layouts_are_refused(wrong):
    with pytest.raises(AssertionError):
        ThoughtLayout(**dict(n_ahead=3, n_ahead_talk=1, n_passes=1, n_positions=1) | wrong)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(AssertionError):
        LAYOUT.pack(torch.zeros(2, 5).long(), torch.zeros(2, 2, 3, 2).long())  # S = 2
    with pytest.raises(AssertionError):
        LAYOUT.pack(torch.zeros(2, 6).long(), torch.zeros(2, 2, 3, 1).long())  # T + A = 6
    with pytest.raises(AssertionError):
        ThoughtLayout.of(torch.zeros(3, 5), torch.zeros(2, 2, 3, 1))
