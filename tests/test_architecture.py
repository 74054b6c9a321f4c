"""The design's rules that can be read off the source: who imports whom, and what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Leaf modules: they import nothing of ours, and anyone in moveimg may import them.
LEAVES = {"moveimg.config", "moveimg.files", "moveimg.device", "moveimg.pictures"}
LEAVES |= {"moveimg.config_model", "moveimg.yaml_files", "moveimg.progress"}
CORE = {"moveimg.model", "moveimg.sampling", "moveimg.checkpoint", "moveimg.pretrained"}
ALLOWED = {
    "tokenizer": set(),
    "moveimg.model": set(),
    "moveimg.sampling": {"moveimg.model"},
    "moveimg.data": set(),
    "moveimg.checkpoint": {"moveimg.model", "tokenizer"},
    "moveimg.pretrained": {"moveimg.model", "moveimg.checkpoint", "tokenizer"},
    "moveimg.pipeline": CORE | {"tokenizer"},
    "moveimg.evaluation": set(),
    "moveimg.reconstruct": {"moveimg.data", "moveimg.evaluation", "tokenizer"},
    "moveimg.sample_sets": {"moveimg.pipeline", "moveimg.sampling", "moveimg.data"}
    | {"moveimg.evaluation"},
    "moveimg.evaluate": {"moveimg.checkpoint", "moveimg.pipeline", "moveimg.pretrained"}
    | {"moveimg.data"}
    | {"moveimg.evaluation", "moveimg.sample_sets"},
    "moveimg.training": CORE
    | {"tokenizer", "moveimg.data", "moveimg.pipeline"}
    | {"moveimg.evaluation", "moveimg.sample_sets", "moveimg.evaluate"},
}
ANYTHING = {"moveimg.cli", "moveimg.commands", "moveimg.inspection", "moveimg.bench", "apps"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "moveimg" else ".".join(parts[:2])


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {
        room_of(name) for name in found if name.split(".")[0] in ("moveimg", "tokenizer", "apps")
    }
    return {room for room in rooms if room != "moveimg"}


FILES = [p for d in ("moveimg", "tokenizer", "apps") for p in sorted((ROOT / d).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room in ANYTHING or module in ("moveimg", "moveimg.__main__"):
        return
    # a leaf may lean on another leaf, never on a room
    allowed = (
        LEAVES if room in LEAVES else ALLOWED[room] | (LEAVES if room != "tokenizer" else set())
    )
    existing = {
        r
        for r in imports_of(path)
        if (ROOT / r.replace(".", "/")).exists() or (ROOT / f"{r.replace('.', '/')}.py").exists()
    }
    assert existing - {room} <= allowed, f"{room} must not import {existing - {room} - allowed}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_command_starts_without_torch():
    modules = loaded_by("import moveimg.cli")
    assert not modules & {"torch", "numpy", "PIL", "yaml", "rich", "pydantic", "timm"}


def test_loading_a_model_leaves_training_the_demo_and_the_compiler_alone():
    """Torch's compiler, and sympy with it, are two seconds of a start."""
    modules = loaded_by(
        "from moveimg import Pipeline; Pipeline.from_pretrained('digits', device='cpu')"
    )
    assert "torch" in modules
    assert not modules & {"gradio", "matplotlib", "sklearn", "torchvision", "timm", "taming"}
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy"}
    assert not {m for m in modules if m.startswith("moveimg.training")}
