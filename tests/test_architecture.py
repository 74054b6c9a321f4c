"""The design's rules that can be read off the source: who imports whom, and what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"files", "errors", "device", "images", "progress", "dist", "class_names"}
LEAVES |= {"tables", "plots", "rng"}
CORE = {"tokenizer", "config", "model", "sampling", "checkpoint", "pretrained"}
# What a room may import beside the leaves.
ALLOWED = {leaf: set() for leaf in LEAVES} | {
    "tokenizer": set(),
    "config": set(),
    "model": {"config"},
    "sampling": {"config", "model"},
    "data": {"config"},
    "checkpoint": {"config", "model", "tokenizer"},
    "pretrained": {"config", "model", "checkpoint", "tokenizer"},
    "editing": {"config", "model", "sampling"},
    "bank_editing": {"model"},
    "pipeline": CORE | {"editing", "bank_editing"},
    "evaluation": CORE | {"data", "pipeline"},
    "training": CORE | {"data", "pipeline", "evaluation"},
}
ON_TOP = {"__init__", "__main__", "cli", "commands", "compare", "compare_report", "inspect"}
ON_TOP |= {"bench", "demo", "diffusers_pipeline", "serve"}


def room_of(module: str) -> str:
    """`moveimg.model.memory` -> model, `tokenizer.vq` -> tokenizer, other packages -> ''."""
    top, *inner = module.split(".")
    if top in ("tokenizer", "apps", "tools"):
        return top
    return inner[0] if top == "moveimg" and inner else ""


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports anywhere, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for inner in (f"{node.module}.{alias.name}" for alias in node.names):
                file = ROOT / inner.replace(".", "/")
                is_module = file.is_dir() or file.with_suffix(".py").is_file()
                modules.add(inner if is_module else str(node.module))
    return modules


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports."""
    return {room_of(module) for module in imported_modules(path)} - {""}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room):
    base = ROOT / ("tokenizer" if room == "tokenizer" else f"moveimg/{room}")
    files = [*base.rglob("*.py"), *base.parent.glob(f"{room}.py")]
    assert files
    for path in files:
        assert imported_rooms(path) <= ALLOWED[room] | LEAVES | {room}, path


def test_no_files_import_each_other_in_a_circle():
    files = [*ROOT.glob("moveimg/**/*.py"), *ROOT.glob("tokenizer/*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in names]
    graph = dict(zip(names, map(imported_modules, files), strict=True))
    assert "moveimg.data.images" in graph["moveimg.data.sources"]
    del graph["moveimg"]  # imports Pipeline at its first use
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_room_has_its_place():
    rooms = {path.stem for path in (ROOT / "moveimg").iterdir() if [*path.rglob("*.py")]}
    rooms |= {path.stem for path in (ROOT / "moveimg").glob("*.py")}
    assert rooms <= ALLOWED.keys() | ON_TOP


def test_commands_start_without_torch_and_a_model_without_training_demo_or_compiler():
    """torch's compiler, and sympy with it, are two seconds of a start."""
    code = """import sys, moveimg.cli; print(*sys.modules)
from moveimg import Pipeline; Pipeline.from_pretrained("digits", device="cpu"); print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    command, model = (set(line.split()) for line in run.stdout.splitlines())
    assert not command & {"torch", "numpy", "PIL", "yaml", "rich", "pydantic", "timm"}
    assert "torch" in model
    assert not model & {"gradio", "matplotlib", "sklearn", "torchvision", "timm", "taming"}
    assert not model & {"torch._dynamo", "torch._inductor", "sympy"}
    assert not {name for name in model if name.startswith("moveimg.training")}
