"""The design's rules that can be read off the source: who imports whom, and what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("moveimg", "tokenizer", "apps", "tools")
# Leaf modules import nothing of ours but other leaves, and every room may import them.
LEAF_NAMES = ("files", "errors", "device", "images", "progress", "dist", "tables", "plots")
LEAVES = {f"moveimg.{name}" for name in LEAF_NAMES}
CORE = {"tokenizer", "moveimg.config", "moveimg.model", "moveimg.sampling", "moveimg.checkpoint"}
CORE |= {"moveimg.pretrained"}
ALLOWED = {
    "tokenizer": set(),
    "moveimg.config": set(),
    "moveimg.model": {"moveimg.config"},
    "moveimg.sampling": {"moveimg.config", "moveimg.model"},
    "moveimg.data": {"moveimg.config"},
    "moveimg.checkpoint": {"moveimg.config", "moveimg.model", "tokenizer"},
    "moveimg.pretrained": {"moveimg.config", "moveimg.model", "moveimg.checkpoint", "tokenizer"},
    "moveimg.pipeline": CORE,
    "moveimg.evaluation": CORE | {"moveimg.data", "moveimg.pipeline"},
    "moveimg.training": CORE | {"moveimg.data", "moveimg.pipeline", "moveimg.evaluation"},
}
ANYTHING = {f"moveimg.{name}" for name in ("cli", "commands", "compare", "inspect", "bench")}
ANYTHING |= {"apps", "tools", "moveimg.compare_table", "moveimg.inspect_bank"}


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
        room_of(name)
        for name in found
        if name.split(".")[0] in ("moveimg", "tokenizer", "apps", "tools")
    }
    return {room for room in rooms if room != "moveimg"}


FILES = [
    p for d in ("moveimg", "tokenizer", "apps", "tools") for p in sorted((ROOT / d).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room in ANYTHING or module in ("moveimg", "moveimg.__main__"):
        return
    allowed = LEAVES if room in LEAVES else ALLOWED[room] | LEAVES
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
    modules = loaded_by("import moveimg.commands")
    assert not modules & {"torch", "numpy", "PIL", "rich", "timm", "matplotlib"}


def test_loading_a_model_leaves_training_the_demo_and_the_compiler_alone():
    """Torch's compiler, and sympy with it, are two seconds of a start."""
    modules = loaded_by(
        "from moveimg import Pipeline; Pipeline.from_pretrained('digits', device='cpu')"
    )
    assert "torch" in modules
    assert not modules & {"gradio", "matplotlib", "sklearn", "torchvision", "timm", "taming"}
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy"}
    assert not {m for m in modules if m.startswith("moveimg.training")}
