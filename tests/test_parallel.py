"""Several processes compute what one does: thoughts, gradients, evaluations, whole runs."""

import pytest
import torch
from many import apart, compute, launch, rows, run
from safetensors.torch import load_file

from nanoqstar import hf
from nanoqstar.state import States
from nanoqstar.tokenizer import load_tokenizer

CASES = [(n, tied, dtype) for n in (2, 4) for tied in ("tied", "untied")
         for dtype in ("float32", "float64")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where 1, 4 and 2 processes, in this order, have done all that is compared: updates,
    and runs, of which `moved` got a signal on 4, went on on 2, and then on one."""
    folder = tmp_path_factory.mktemp("parallel")
    compute(folder)
    assert run(folder / "1") == 0
    for n, stop in ((4, (3, 12)), (2, (1, 7))):
        resumed = f", '--resume', {str(folder / 'moved')!r}" * (n == 2)
        code = f"""
from pathlib import Path
folder = Path({str(folder)!r})
many.compute(folder)
many.read_rows(folder / '1')
assert many.run(folder / '{n}') == 0
assert many.run(folder / 'moved', {stop}{resumed}) == 143"""
        codes = launch(n, code, folder / f"log-{n}")
        assert codes == [0] * n, (folder / f"log-{n}").read_text()
    assert run(None, None, "--resume", str(folder / "moved")) == 0
    return folder


def found(work, n, tied, dtype):
    return load_file(work / f"{tied}-{dtype}-{n}.safetensors")


@pytest.mark.parametrize(("n", "tied", "dtype"), CASES)
def test_updates_are_those_of_one_process(work, n, tied, dtype):
    """Thoughts bit for bit, those of evaluation too; gradients and all else to rounding, over
    updates with accumulation, clipping and an evaluation after each."""
    one, many = found(work, 1, tied, dtype), found(work, n, tied, dtype)
    assert one.keys() == many.keys()
    tolerance = {"float32": 1e-6, "float64": 1e-12}[dtype]
    # whether an advantage of rounding counts as one is rounding, too
    for name in (x for x in one if not x.startswith(("gathers", "reduced", "live", "positive"))):
        a, b = one[name], many[name]
        if "thoughts" in name:
            assert torch.equal(a, b), name
        elif name.endswith("grad0"):
            assert (a - b).norm() <= tolerance * a.norm(), name
        else:  # Adam turns the rounding of small gradients into steps
            assert (a - b).abs().max() <= 100 * tolerance * max(1, a.abs().max()), name


@pytest.mark.parametrize("n", [2, 4])
def test_a_block_is_gathered_once_for_rollout_score_and_backward(work, n):
    """2 blocks and the root: 3 gatherings by the end of the first rollout, and none after it, in
    any micro-batch; and a reduction of each in every backward."""
    many = found(work, n, "tied", "float32")
    assert many["gathers"].tolist() == [3] * (2 * 4 // n)
    assert many["reduced"] == 3 * 4 // n
    assert found(work, 1, "tied", "float32")["gathers"].tolist() == [0] * 8


def test_a_run_is_that_of_one_process(work):
    """20 updates after pre-training, with evaluations, in fp32."""
    for n in (2, 4):
        assert apart(work / str(n), work / "1") < 1e-3
    assert [row["step"] for row in rows(work / "1") if row["kind"] == "think"] == [*range(1, 21)]


def test_a_signal_that_reaches_one_rank_stops_all_and_the_run_goes_on_on_fewer(work):
    """From 4 to 2 and from 2 to 1: rows, none twice and none missing, and weights."""
    assert apart(work / "moved", work / "1") < 1e-3
    said = {n: (work / f"log-{n}").read_text() for n in (2, 4)}
    assert "step-000012: think 5/20" in said[2] and "4 processes, and this is" in said[2]
    for n, update in ((4, 5), (2, 12)):
        assert said[n].count(f"interrupted; update {update} is saved in") == 1
        assert "Traceback" not in said[n]
    one, moved = (load_file(work / x / "checkpoint" / "model.safetensors") for x in ("1", "moved"))
    assert all((one[x] - moved[x]).abs().max() < 1e-3 for x in one)


def test_each_rank_writes_its_rows_and_the_first_one_a_whole_model(work):
    newest = States(work / "4" / "state", 1).folders()[-1]
    files = sorted(newest.glob("rank-*"))
    assert [x.name for x in files] == [f"rank-0000{r}.safetensors" for r in range(4)]
    parts = [load_file(x) for x in files]
    model, _, _ = hf.load_thinker(work / "4")
    for name, p in model.named_parameters():
        assert torch.equal(torch.cat([x[name] for x in parts]), p)
        assert [len(x[name]) for x in parts][:3] == [
            len(x) for x in (*p.chunk(4), p[:0], p[:0])][:3]
    assert load_tokenizer(work / "4" / "checkpoint").get_vocab_size() == model.lm.config.vocab_size
