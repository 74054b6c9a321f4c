"""What a training run costs, from its config alone: memory per GPU, hours, traffic, disk.

An estimate by formula; nothing is run. `describe_budget` lists the assumptions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from moveimg.config import TrainConfig
from moveimg.config.model import ModelConfig, SwiGLUConfig
from moveimg.device import shapes_only
from moveimg.model import transformer
from moveimg.model.cost import cost_of
from moveimg.model.feedforward import SwiGLU, swiglu_hidden
from moveimg.model.memory import GatedMixer
from moveimg.model.transformer import Transformer
from moveimg.tables import format_bytes


class Device(NamedTuple):
    """Rates of the vendor's data sheet: dense bfloat16 FLOP/s; bytes/s of memory, of its link."""

    flops: float
    memory: float
    link: float


DEVICES = {  # by a part of the device's name; the first that matches counts
    "B200": Device(2250e12, 8.0e12, 900e9),
    "H200": Device(989e12, 4.8e12, 450e9),
    "H100 PCIe": Device(756e12, 2.0e12, 64e9),
    "H100": Device(989e12, 3.35e12, 450e9),
    "A100": Device(312e12, 2.0e12, 300e9),
    "L40S": Device(362e12, 0.86e12, 32e9),
    "L4": Device(121e12, 0.3e12, 32e9),
    "A10": Device(125e12, 0.6e12, 32e9),
    "RTX 4090": Device(165e12, 1.0e12, 32e9),
    "RTX 3090": Device(71e12, 0.94e12, 32e9),
}
IMAGENET_CLASSES, IMAGENET_IMAGES, IMAGENET_VIEWS = 1000, 1_281_167, 20
# Bytes per parameter kept while training: float32 weights, gradients, Adam's two moments, EMA.
WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4
# Bytes per parameter that a step moves in memory besides activations: gradients zeroed and written
# (8), norm and clipping (12), AdamW (reads 4 numbers, writes 3: 28), EMA (12); and for every pass
# over a micro-batch the bfloat16 copy of a weight is made (6) and read twice (4).
UPDATE, PASS = 8 + 12 + 28 + 12, 6 + 4
# (share of peak FLOP/s, of memory bandwidth, of link bandwidth, exposed share of communication)
FAST, SLOW = (0.5, 0.9, 0.8, 0.0), (0.25, 0.6, 0.4, 1.0)


def train_budget(config: TrainConfig, gpus: int = 8, gpu: str = "H100") -> dict[str, Any]:
    """The budget of a run on `gpus` devices; memory and traffic are bytes per device.

    Returns a dict of plain data, with these keys among others:
        tokens: codes that a device trains on in one pass.
        state: weights, gradients, moments, average; a share of them with FSDP2.
        copies: weights in bfloat16, and with FSDP2 those gathered and reduced at a time.
        activations: kept for the backward pass by the blocks and the value memory.
        head: a chunk of logits and their gradients, the head and its gradient.
        memory: the sum.
        hours: of all steps, the least and the most.
        update_per_step: bytes of weights, gradients, moments and average moved per step.
        bank_per_image: bytes of value memory gathered per image.
        checkpoints: bytes on disk: those kept, the best, the one being written, the model.
        epoch: totals of an epoch over all devices; {} where its number of images is unknown.

    Raises ValueError for an unknown GPU, or a batch that `gpus` cannot share.
    """
    if gpu not in DEVICES:
        raise ValueError(f"gpu {gpu!r}: expected one of {', '.join(DEVICES)}")
    micro = min(config.micro_batch or config.batch_size, config.batch_size)
    if gpus < 1 or config.batch_size % (micro * gpus):
        raise ValueError(
            f"batch_size {config.batch_size} in micro-batches of {micro}: "
            f"expected a multiple of {micro} x {gpus} GPUs"
        )
    with shapes_only():
        model = Transformer(config.model)
    cost, length = cost_of(model), config.model.seq_len
    total, tokens = cost.parameters, micro * length
    passes = config.batch_size // (micro * gpus)
    sharded = config.distributed == "fsdp" and gpus > 1
    state = total * (WEIGHT + GRADIENT + MOMENTS + (AVERAGE if config.ema else 0))
    copies = 2 * total  # autocast keeps the matrices' bfloat16 copies for the backward pass
    if sharded:
        # Two blocks and the root are gathered in bfloat16; gradients of a block and of the root
        # are whole in bfloat16, then in float32 for the sum.
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers]
        block, root = max(blocks), total - sum(blocks)
        state, copies = state // gpus, 2 * (2 * block + root) + 6 * (block + root)
    by_block = [block_activations(config.model, block) for block in model.layers]
    kept = sum(by_block)
    if config.activation_checkpointing:
        kept = config.model.n_layer * 4 * config.model.width + max(by_block)
    # rows in bfloat16 and their gradient (the cost's bytes are float32's)
    activations = tokens * (kept + cost.bank_bytes_per_token)
    head = head_bytes(config.model, tokens)
    # Previews and validation gather whole float32 weights when the rest is free again.
    working = max(copies + activations + head, total * WEIGHT if sharded else 0)
    flops = (4 if config.activation_checkpointing else 3) * cost.flops_per_token * length
    flops *= config.batch_size
    # DDP: an all-reduce of float32 gradients; FSDP2: weights gathered in bfloat16 forward and
    # backward for every micro-batch, gradients scattered once in float32.
    sent = (gpus - 1) / gpus * total * ((4 * passes + 4) if sharded else 8)
    moved = UPDATE * total / (gpus if sharded else 1) + PASS * passes * total
    fast, slow = (
        _step_seconds(DEVICES[gpu], flops / gpus, moved, sent, *shares) for shares in (FAST, SLOW)
    )
    budget: dict[str, Any] = {
        "gpus": gpus,
        "gpu": gpu,
        "parameters": total,
        "tokens": tokens,
        "state": state,
        "copies": copies,
        "activations": activations,
        "head": head,
        "memory": state + working,
        "flops_per_step": flops,
        "hours": (config.steps * fast / 3600, config.steps * slow / 3600),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "network_per_step": sent,
        "update_per_step": moved,
        "bank_per_image": cost.bank_bytes_per_token * length,
        "checkpoints": total * (WEIGHT + MOMENTS + AVERAGE) * (config.keep_checkpoints + 2)
        + total * WEIGHT,
        "codes": None,
        "epoch": {},
    }
    if config.model.n_classes == IMAGENET_CLASSES:
        steps = IMAGENET_IMAGES // config.batch_size
        budget["codes"] = IMAGENET_IMAGES * (IMAGENET_VIEWS * length * 2 + 4)
        budget["epoch"] = {
            "steps": steps,
            "flops": steps * flops,
            "hours": (steps * fast / 3600, steps * slow / 3600),
            "codes_read": IMAGENET_IMAGES * (length * 2 + 4),
            "bank_looked_up": IMAGENET_IMAGES * budget["bank_per_image"],
            "updates": steps * moved * gpus,
            "network": steps * sent * gpus,
        }
    return budget


def _step_seconds(
    device: Device, flops: float, moved: float, sent: float,
    peak: float, memory: float, link: float, exposed: float,
) -> float:  # fmt: skip
    """Seconds of a step at shares `peak`, `memory` and `link` of a device's rates.

    Communication runs beside the computation, except for its `exposed` share.
    """
    compute, communicate = flops / (device.flops * peak), sent / (device.link * link)
    overlapped = max(compute, communicate * (1 - exposed))
    return overlapped + communicate * exposed + moved / (device.memory * memory)


def head_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes that the loss holds at a time, in bfloat16 autocast.

    Of a chunk's logits the float32 ones and their log-softmax; the head in bfloat16, its gradient
    in float32, and the gradient of the head's input.
    """
    size = config.codebook_size
    logits = min(max(transformer.CHUNK, size), tokens * size)
    return 8 * logits + 6 * size * config.width + 4 * tokens * config.width


def block_activations(config: ModelConfig, block: nn.Module) -> int:
    """Bytes per token that a block keeps for the backward pass, in bfloat16 autocast.

    Counted for MHA and SwiGLU in eager mode (a test counts again); other kinds are assumed to be
    alike. CUDA's fused norms and dropout keep 10 per unit of width less, a compiled block less
    again.
    """
    ffn: Any = block.ffn
    hidden = swiglu_hidden(config.width, SwiGLUConfig())
    if isinstance(ffn, SwiGLU):
        hidden = ffn.w1.out_features
    mixers = [module for module in block.modules() if isinstance(module, GatedMixer)]
    mixed = sum(4 * m.value_width + 4 * m.router.out_features for m in mixers)
    mixed -= sum(6 * config.width for m in mixers if not m.gate_standard)  # V itself is not kept
    return 38 * config.width + 8 * hidden + 4 * config.n_head + 8 + mixed


def describe_budget(budget: dict[str, Any]) -> str:
    """The budget as text for people, with its assumptions."""
    b, epoch, device = budget, budget["epoch"], DEVICES[budget["gpu"]]
    rows = [
        ("memory per GPU", format_bytes(b["memory"]), f"{b['tokens']:,} codes per pass"),
        ("  weights, AdamW, EMA", format_bytes(b["state"]), ""),
        ("  copies, gathered", format_bytes(b["copies"]), ""),
        ("  activations", format_bytes(b["activations"]), ""),
        ("  logits and loss", format_bytes(b["head"]), ""),
        ("FLOPs per step", f"{b['flops_per_step']:.3g}", f"{b['batch_size']} images"),
        ("hours", _hours(b["hours"]), f"{b['steps']:,} steps"),
        ("sent per step and GPU", format_bytes(b["network_per_step"]), ""),
        (
            "updates per step, GPU",
            format_bytes(b["update_per_step"]),
            "weights, gradients, AdamW, EMA",
        ),
        ("checkpoints on disk", format_bytes(b["checkpoints"]), ""),
    ]
    if epoch:
        rows += [
            ("codes on disk", format_bytes(b["codes"]), f"{IMAGENET_VIEWS} views"),
            ("an epoch", f"{epoch['steps']:,}", "steps"),
            ("  FLOPs", f"{epoch['flops']:.3g}", ""),
            ("  hours", _hours(epoch["hours"]), ""),
            ("  codes read", format_bytes(epoch["codes_read"]), ""),
            ("  bank gathered", format_bytes(epoch["bank_looked_up"]), ""),
            ("  updates", format_bytes(epoch["updates"]), ""),
            ("  sent", format_bytes(epoch["network"]), ""),
        ]
    lines = [f"{k:<22}{v:>15}" + (f"  ({note})" if note else "") for k, v, note in rows]
    fast, slow = (f"{s[0]:.0%}, {s[1]:.0%} and {s[2]:.0%}" for s in (FAST, SLOW))
    lines += [
        "",
        f"Assumed, not measured: {b['gpus']} x {b['gpu']}, each {device.flops / 1e12:.0f} TFLOP/s, "
        f"{device.memory / 1e12:.2g} TB/s of memory",
        f"and {device.link / 1e9:.0f} GB/s between GPUs. The hours range from {fast} of them,",
        f"with communication hidden, to {slow}, with none hidden.",
        "Float32 weights, AdamW, bfloat16 arithmetic, eager mode. The time leaves out activation",
        "traffic and reading data; the memory leaves out CUDA's own (about 1 GB).",
    ]
    return "\n".join(lines)


def comment(budget: dict[str, Any]) -> str:
    """The budget as the comment of a config."""
    disk = f"{format_bytes(budget['checkpoints'])} of checkpoints"
    if budget["codes"] is not None:
        disk = f"{format_bytes(budget['codes'])} of codes, {disk}"
    memory = format_bytes(budget["memory"])
    return (
        f"# {budget['gpus']} x {budget['gpu']}, estimated (moveimg info --train): "
        f"{memory} per GPU, {_hours(budget['hours'])} hours;\n# on disk {disk}."
    )


def _hours(hours: tuple[float, float]) -> str:
    if hours[1] < 0.05:
        return "under 0.05 (starting kernels, which is not counted, takes longer)"
    return " to ".join(f"{h:.0f}" if h >= 10 else f"{h:.2g}" for h in hours)
