"""What may import what: six packages and the standard library, inside the package only rows above
(STYLE); and what importing does: nothing heavy before arguments are parsed, nothing to torch."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm"}
GUARDED = {"pyarrow", "wandb", "lm_eval"}  # optional extras, inside functions only
ORDER = [  # a module imports from those before it
    "cli", "files", "cpu", "parallel", "device", "qwen2", "lora", "thoughts", "attention", "head",
    "objective", "dataset", "quietstar", "sampling", "evaluate", "flops", "hub", "tokenizer",
    "weights", "hf", "continuation", "tasks", "answers", "state", "plan", "runlog", "run", "stages",
    "charts", "heatmap", "report", "plot", "worth", "export", "transformers", "lm_eval",
    "delimiters", "interventions", "bench", "paper", "experiments", "depth"]
LIGHT = {"nanoqstar", "nanoqstar.cli", "nanoqstar.files"}  # the standard library and each other
SCRIPTS = ("train.py", "sample.py", "data/prepare.py", "nanoqstar.evaluate", "nanoqstar.report",
           "nanoqstar.bench", "nanoqstar.experiments", "nanoqstar.export")
FILES = [*sorted((ROOT / "nanoqstar").glob("*.py")), *sorted((ROOT / "data").glob("*.py")),
         *(ROOT / name for name in ("train.py", "sample.py", "configs.py"))]


def imports(path):
    """(module, at the top level of the file?) of every import."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
             for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "nanoqstar":  # a room, or something defined in the package itself
                names = [f"nanoqstar.{alias.name}" if alias.name in ORDER else "nanoqstar"
                         for alias in node.names]
            yield from ((name, id(node) not in inner) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_nothing_but_the_six_packages(path):
    ours = {"nanoqstar", "data", "configs", "train"}
    for module, at_top in imports(path):
        package = module.split(".")[0]
        assert (package in PACKAGES | ours | set(sys.stdlib_module_names)
                or (package in GUARDED and not at_top)), f"{path.name} imports {module}"


@pytest.mark.parametrize("name", ["configs.py", "nanoqstar/__init__.py", "nanoqstar/cli.py",
                                  "nanoqstar/files.py"])
def test_light_rooms_import_the_standard_library_and_each_other(name):
    for module, _ in imports(ROOT / name):
        assert module in LIGHT | set(sys.stdlib_module_names) | {"collections.abc"}, module


def test_every_room_has_its_place():
    assert {path.stem for path in (ROOT / "nanoqstar").glob("[!_]*.py")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_what_stands_before_it(name):
    for module, at_top in imports(ROOT / "nanoqstar" / f"{name}.py"):
        package, _, room = module.partition(".")
        if package == "nanoqstar" and room:
            assert ORDER.index(room) < ORDER.index(name), f"{name}.py imports {module}"
        if at_top:
            assert package not in ("configs", "train", "data"), f"{name}.py imports {module}"


CHILD = f"""
import contextlib, importlib, io, os, runpy, sys
sys.path.insert(0, "")  # as for a script in the root
import configs, nanoqstar.cli, nanoqstar.files
configs.list_presets()

def heavy():
    return sorted({PACKAGES!r} & sys.modules.keys())

assert not heavy(), ("configs", heavy())
for script in {SCRIPTS!r}:
    for args, code in ((["--help"], 0), (["--no_such_option"], 2)):
        sys.argv = [script, *args]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                if script.endswith(".py"):
                    runpy.run_path(script, run_name="__main__")
                else:
                    runpy.run_module(script, run_name="__main__")
            except SystemExit as end:
                assert (end.code or 0) == code, (script, args, end.code)
            else:
                assert False, (script, "goes on")
        assert not heavy(), (script, args, heavy())
print("light")

import torch, torch._dynamo.config, torch._functorch.config, torch._inductor.config

def settings():
    found = {{f"{{config.__name__}}.{{name}}": value for config in (
        torch._dynamo.config, torch._functorch.config, torch._inductor.config)
        for name, value in config.to_dict().items()}}
    return found | dict(
        threads=torch.get_num_threads(), interop=torch.get_num_interop_threads(),
        dtype=torch.get_default_dtype(), device=torch.get_default_device(),
        grad=torch.is_grad_enabled(), matmul=torch.get_float32_matmul_precision(),
        deterministic=torch.are_deterministic_algorithms_enabled(), seed=torch.initial_seed(),
        tf32=torch.backends.cuda.matmul.allow_tf32, environment=dict(os.environ),
        numbers=torch.get_rng_state().sum().item())

before = settings()
assert len(before) > 300, len(before)
for room in {ORDER!r}:
    importlib.import_module(f"nanoqstar.{{room}}")
import data.fold, data.prepare, train, sample
after = settings()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
print("unchanged")
"""


def test_importing_is_light_until_it_is_needed_and_sets_nothing():
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.stdout.split() == ["light", "unchanged"], done.stderr


COMPILES = """
from types import SimpleNamespace as Some
from torch import device, nn
from nanoqstar.device import compiled, speed_up
block = nn.Linear(1, 1)
speed_up(Some(lm=Some(model=Some(layers=[block]))), device("cpu"), 0.5, compile=True)
compiled(abs)
import torch._functorch.config
print(torch._functorch.config.activation_memory_budget, block._compiled_call_impl is not None)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_compiling_imports_what_it_needs():
    """In a process where nobody else has: torch alone does not import its compiler's settings."""
    done = subprocess.run([sys.executable, "-c", COMPILES], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.stdout.split() == ["0.5", "True"], done.stderr


def test_readme_promises_the_dependencies_that_are_declared():
    project, readme = ((ROOT / name).read_text() for name in ("pyproject.toml", "README.md"))
    declared = re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1]
    names = {re.match(r"[\w-]+", x)[0].replace("-", "_") for x in re.findall(r'"(.*?)"', declared)}
    assert names == PACKAGES
    assert all(name.replace("_", "-") in readme for name in PACKAGES)
