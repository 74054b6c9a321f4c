"""The value mix: in Triton's interpreter, by Triton's compiler, and which way is taken where."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moveimg.model import Transformer
from moveimg.model.fused_mix import BankRows, usable
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton comes with torch on Linux alone"
)


@needs_triton
def test_it_is_right_in_tritons_interpreter():
    inner = Path(__file__).with_name("test_value_mix.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(inner)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@needs_triton
def test_its_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter does not check: types, shapes and layouts, for a real architecture."""
    code = "from tests.test_fused_mix import compile_all; compile_all('bf16', 90)"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["mix_forward", "mix_backward", "bank_gradient", "add_chunks"]


def compile_all(number, capability):
    """Compile each kernel for GPT-L's sizes to machine code, and print its name."""
    import triton
    from triton.backends.compiler import GPUTarget

    from moveimg.model import mix_kernels

    sizes = {"ALL": 12, "HEADS": 16, "WIDTH": 64, "SLOTS": 12, "GATED": 1, "BLOCK_K": 64}
    mixed = sizes | {"HAS_V": True, "BLOCK_H": 16}
    added = sizes | {"ALIGNED": 8, "CHUNK": 64, "PRECISION": "tf32x3", "BLOCK_L": 16, "BLOCK_A": 16}
    summed = {"ROW": 12288, "CHUNK": 64, "BLOCK": 1024}
    types = dict.fromkeys(("ids", "order", "partial_row", "place_of"), "*i64")
    types |= dict.fromkeys(("outs", "gates", "firsts"), "*i64")
    types |= dict.fromkeys(("begin", "end"), "*i32")
    types |= dict.fromkeys(("first", "v_stride", "n_layer", "tokens"), "i32")
    types |= dict.fromkeys(("d_table", "partial"), "*fp32")
    for name, constants in (
        ("mix_forward", mixed), ("mix_backward", mixed), ("bank_gradient", added),
        ("add_chunks", summed),
    ):  # fmt: skip
        kernel = getattr(mix_kernels, name)
        signature = {
            p: "constexpr" if p in constants else types.get(p, f"*{number}")
            for p in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        print(name)


def test_on_a_cpu_whole_sequences_go_by_bags_and_steps_by_gathered_rows():
    config = tiny_config(memory={"kind": "move", "slots": 2})
    model = Transformer(config)
    codes, labels = random_inputs(config)
    for inputs in ((labels, None), (None, codes[:, :1])):
        rows = model.memory.rows(*inputs)
        assert rows[0].shape == (3, 1, 2, 2, 8) and all(r is rows[0] for r in rows)
    assert all(isinstance(r, BankRows) for r in model.memory.rows(labels, codes))
    low = model.bfloat16().memory.rows(labels, codes)  # bags would round their weights
    assert low[0].shape == (3, 13, 2, 2, 8)


@pytest.mark.parametrize("name", ["mha-move-3-class-rows-swiglu", "mla-lave-x2-gated-swiglu"])
def test_bags_under_autocast_keep_float32_gradients(name, monkeypatch):
    from moveimg.model import memory

    config = tiny_config(**VARIANTS[name], resid_dropout=0.0, ffn_dropout=0.0, token_dropout=0.0)
    model = lively(config, dtype=torch.float32)
    codes, labels = random_inputs(config)
    found = []
    for bags in (True, False):
        monkeypatch.setattr(memory, "usable", lambda *given, on=bags: on and usable(*given))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(codes, labels).float().square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):  # of 8 bits, through two layers and back
        assert a.dtype == torch.float32 and (a - b).norm() < 0.12 * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_equals_the_plain_formulation(dtype, monkeypatch):
    from moveimg.model import memory

    config = tiny_config(memory={"kind": "move", "slots": 3}, codebook_size=50)
    model = lively(config, dtype=dtype).cuda()
    codes, labels = (part.cuda() for part in random_inputs(config, batch=64))
    found = []
    for fused in (True, False):
        monkeypatch.setattr(memory, "usable", lambda *given, on=fused: on and usable(*given))
        model.zero_grad()
        assert isinstance(model.memory.rows(labels, codes)[0], BankRows) == fused
        model(codes, labels).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    precision = 1e-3 if dtype == torch.float32 else 0.05
    for one, plain in zip(*found, strict=True):
        assert (one - plain).float().norm() <= precision * plain.float().norm()


def test_the_model_is_imported_without_triton():
    code = "import sys, moveimg.model; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
