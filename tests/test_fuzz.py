"""A quick part of tests/fuzz.py, and what it stands on: nothing of ours unpickles or executes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hf import random_model, store

from nanoqstar import lora
from nanoqstar.hf import load_thinker

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("nanoqstar/*.py"), *ROOT.glob("data/*.py")]
MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.jit", "np.load", "torch.hub", "torch.package", "os.system"}


def python(*args):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                          check=False)


def test_a_hundred_cases():
    done = python("tests/fuzz.py", "--cases", "100", "--seed", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 cases in " in done.stdout and ": 0 findings" in done.stdout


def test_what_must_not_be_done_is_noticed(tmp_path):
    """By the watcher that every case of fuzz.py runs under."""
    (tmp_path / "slot" / "beside").mkdir(parents=True)
    (tmp_path / "slot" / "beside" / "a").write_text("")
    done = python("-c", f"""
import os, sys
sys.path.insert(0, 'tests')
import fuzz, pickle
os.chdir({str(tmp_path / 'slot')!r})
data = pickle.dumps(os.path.join)
fuzz.watch(os.getcwd(), 1)
open('inside', 'w'), open('inside'), open(fuzz.__file__), os.listdir('.')  # may be done
for act in (lambda: open('beside/a'), lambda: open('../a', 'w'), lambda: pickle.loads(data),
            lambda: os.listdir('..'), lambda: os.system('true') or 1,
            lambda: os.rename('inside', '../b'), lambda: open('/nowhere/x'),
            lambda: open(fuzz.__file__, 'a'), lambda: exec(compile('1', '/tmp/evil.py', 'exec')),
            os.fork):
    os.write(1, b'-')
    try:
        if act() == 0:
            os._exit(0)
    except OSError:
        pass
""")
    lines = [line for line in done.stdout.splitlines() if line != "-"]
    assert len(lines) >= 10 and all("VIOLATION: " in x for x in lines), done.stdout + done.stderr
    assert sum(x.startswith("-") for x in lines) == 10, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_executes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = [node.module] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in node.names]
            assert not {str(name).split(".")[0] for name in found} & MODULES, path
        elif isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in NAMES), path
            assert "allow_pickle" not in {k.arg for k in node.keywords}, path
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in CALLS, path


def test_an_adapter_is_written_and_never_read(tmp_path):
    """It is for others: the model beside it has it merged already. A pipe would be waited for."""
    model = random_model()
    lora.add(model.lm, 2, 4)
    for name, x in model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(x)
    folder = store(tmp_path / "model", model)
    expected = load_thinker(folder)[0].state_dict()
    files = sorted((folder / "adapter").iterdir())
    assert [x.name for x in files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        file.unlink()
        os.mkfifo(file)
    again = load_thinker(folder)[0].state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in again.items())
