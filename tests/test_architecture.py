"""The design's rules that can be read off the source: who imports whom, and what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
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
ON_TOP = {"__main__", "cli", "commands", "compare", "compare_report", "inspect", "bench", "demo"}
ON_TOP |= {"diffusers_pipeline", "serve"}
FILES = [p for d in ("moveimg", "tokenizer") for p in sorted((ROOT / d).rglob("*.py"))]


def room_of(module: str) -> str:
    """`moveimg.model.memory` -> model, `tokenizer.vq` -> tokenizer, other packages -> ''."""
    top, *inner = module.split(".")
    if top in ("tokenizer", "apps", "tools"):
        return top
    return inner[0] if top == "moveimg" and inner else ""


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports anywhere, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {alias.name for alias in getattr(node, "names", ())}
        if isinstance(node, ast.Import):
            modules |= names
        elif isinstance(node, ast.ImportFrom):
            parent = str(node.module)
            modules |= {f"moveimg.{name}" for name in names} if parent == "moveimg" else {parent}
    return {room_of(module) for module in modules} - {"", "__version__", "DEFAULT_MODEL"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room in ON_TOP or module == "moveimg":
        return
    assert imported_rooms(path) <= ALLOWED[room] | LEAVES | {room}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_command_starts_without_torch():
    modules = loaded_by("import moveimg.cli")
    assert not modules & {"torch", "numpy", "PIL", "yaml", "rich", "pydantic", "timm"}


def test_loading_a_model_loads_no_training_demo_or_compiler():
    """torch's compiler, and sympy with it, are two seconds of a start."""
    modules = loaded_by(
        "from moveimg import Pipeline; Pipeline.from_pretrained('digits', device='cpu')"
    )
    assert "torch" in modules
    assert not modules & {"gradio", "matplotlib", "sklearn", "torchvision", "timm", "taming"}
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy"}
    assert not {m for m in modules if m.startswith("moveimg.training")}
