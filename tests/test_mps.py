"""A smoke test on Apple's MPS; and elsewhere that nothing but CUDA's own code needs CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import rows, start

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS")
def test_a_run_learns_on_mps(tmp_path):
    """The demo, shortened: sampling, scoring, backward, optimizer, evaluation, checkpoint."""
    out = tmp_path / "out"
    assert start(out, device="mps", pretrain_steps=60, pretrain_batch_size=16, max_steps=4) == 0
    losses = [row["nll_base"] for row in rows(out, "pretrain")]
    assert losses[-1] < losses[0] - 0.02 and rows(out, "eval")[-1]["step"] == 4
    assert (out / "checkpoint" / "quietstar.safetensors").exists()


WITHOUT_CUDA = """
import functools, importlib, pathlib, sys
import torch

ROOT, ROOMS = sys.argv[1], sorted(p.stem for p in pathlib.Path("nanoqstar").glob("[!_]*.py"))

def refused(name, function):
    @functools.wraps(function)
    def call(*args, **options):
        caller = sys._getframe(1).f_code.co_filename
        assert not caller.startswith(ROOT), f"{caller} calls torch.cuda.{name}"
        return function(*args, **options)
    return call

for name, function in list(vars(torch.cuda).items()):
    if callable(function) and not isinstance(function, type) and name != "is_available":
        setattr(torch.cuda, name, refused(name, function))
torch.cuda.is_available = lambda: False
for room in ROOMS:
    importlib.import_module(f"nanoqstar.{room}")
import sample, train
from data import fold, prepare
from test_train import start
assert start(sys.argv[2]) == 0
compiler = "torch._inductor.compile_fx" in sys.modules
assert not compiler and not torch.cuda.is_initialized()
print("trained", len(ROOMS))
"""


def test_importing_everything_and_training_call_nothing_of_cudas(tmp_path):
    """In a process where nobody else has: every function of torch.cuda refuses our code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['', 'tests']\n{WITHOUT_CUDA}",
         str(ROOT), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [
        f"trained {len(list((ROOT / 'nanoqstar').glob('[!_]*.py')))}"], done.stderr
