"""What may import what: six packages and the standard library, and inside the package only rows above (STYLE)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm"}
GUARDED = {"pyarrow", "wandb"}  # optional extras, inside functions only
ORDER = ["cli", "files", "device", "qwen2", "thoughts", "attention", "head", "objective", "quietstar",
         "sampling", "evaluate", "flops", "dataset", "hub", "tokenizer", "weights", "hf",
         "runlog", "bench", "experiments"]  # a module imports from those before it
FILES = [*sorted((ROOT / "nanoqstar").glob("*.py")), *sorted((ROOT / "data").glob("*.py")),
         *(ROOT / name for name in ("train.py", "sample.py", "configs.py"))]


def imports(path):
    """(module, at the top level of the file?) of every import."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "nanoqstar":
                names = [f"nanoqstar.{alias.name}" for alias in node.names]
            yield from ((name, id(node) not in inner) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_nothing_but_the_six_packages(path):
    ours = {"nanoqstar", "data", "configs", "train"}
    for module, at_top in imports(path):
        package = module.split(".")[0]
        allowed = package in PACKAGES | ours | set(sys.stdlib_module_names) or package in GUARDED and not at_top
        assert allowed, f"{path.name} imports {module}"


def test_configs_imports_the_standard_library_only():
    assert all(module.split(".")[0] in sys.stdlib_module_names for module, _ in imports(ROOT / "configs.py"))


def test_modules_import_only_what_stands_before_them():
    for path in (ROOT / "nanoqstar").glob("[!_]*.py"):
        for module, at_top in imports(path):
            if module.startswith("nanoqstar."):
                name = module.split(".")[1]
                if name in ORDER:  # nanoqstar.InputError is no module
                    assert ORDER.index(name) < ORDER.index(path.stem), f"{path.name} imports {module}"
            if at_top:
                assert module.split(".")[0] not in ("configs", "train", "data"), f"{path.name} imports {module}"


def test_readme_promises_the_dependencies_that_are_declared():
    project = (ROOT / "pyproject.toml").read_text()
    for package in PACKAGES:
        assert package.replace("_", "-") in project and package.replace("_", "-") in (ROOT / "README.md").read_text()
