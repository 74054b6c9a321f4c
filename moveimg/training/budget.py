"""An estimate of a training run from its config: memory per GPU, FLOPs, hours, bytes.

By formula; nothing is run. `describe_budget` prints the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moveimg.config import TrainConfig
from moveimg.config.model import ModelConfig, SwiGLUConfig
from moveimg.data import codes_bytes
from moveimg.device import shapes_only
from moveimg.dist import World
from moveimg.model import CHUNK, GatedMixer, SwiGLU, Transformer, swiglu_hidden
from moveimg.model.cost import cost_of
from moveimg.training.logging import PEAKS
from moveimg.training.parallel import choose_parallelism

IMAGENET_CLASSES, IMAGENET_IMAGES, IMAGENET_VIEWS = 1000, 1_281_167, 20
# Assumed, best and worst: share of the peak FLOP/s (a run logs what it reaches as `mfu`), share of
# the memory bandwidth in updates, and the bandwidth of communication that nothing overlaps.
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = (0.5, 0.25), (0.9, 0.6)
LINK = (math.inf, 100e9)
# Bytes/s of the vendors' data sheets, for the devices of PEAKS.
BANDWIDTH = {
    "B200": 8e12, "H200": 4.8e12, "H100 PCIe": 2e12, "H100": 3.35e12, "A100": 2e12,
    "L40S": 864e9, "L4": 300e9, "A10": 600e9, "RTX 4090": 1008e9, "RTX 3090": 936e9,
}  # fmt: skip
# Bytes per parameter that training keeps: float32 weights, gradients, Adam's two moments, EMA.
WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4
# Bytes per parameter that a step moves in memory at the least, after the backward pass: the norm
# and the clipping (read, read and write), AdamW (reads 4 numbers, writes 3), EMA (reads 2,
# writes 1).
STEP_TRAFFIC = 12 + 28 + 12


@dataclass(frozen=True)
class Budget:
    """What a run on `gpus` devices costs. Memory and traffic are per device, in bytes.

    Attributes:
        parameters: of the model.
        tokens: that a device trains on in one pass, micro_batch * T.
        state: weights, gradients, moments, average; a share of them with FSDP2.
        copies: weights in bfloat16, and with FSDP2 what is gathered and reduced at a time.
        activations: kept for the backward pass by the blocks and the value memory.
        head: a chunk of logits and what the loss makes of them, the head and its gradient.
        memory: all of it together.
        flops_per_step: of the whole batch, 3 forward passes (4 with activation checkpointing).
        hours: of all the steps, best and worst: products, updates and communication.
        network_per_step: bytes a device sends for a step.
        update_per_step: bytes that clipping, AdamW and EMA move in a device's memory.
        images_per_epoch: of the training set; None where it is not known.
        bank_per_image: bytes of value memory looked up for an image (as many numbers come back
            as gradients).
        codes: bytes on disk, of all views; codes_read: of one view an image.
        checkpoints: bytes on disk: those kept, the best, the one being written, the model.
    """

    gpus: int
    gpu: str
    peak: float
    parameters: int
    tokens: int
    state: int
    copies: int
    activations: int
    head: int
    memory: int
    flops_per_step: float
    hours: tuple[float, float]
    steps: int
    batch_size: int
    network_per_step: float
    update_per_step: float
    images_per_epoch: int | None
    bank_per_image: int
    codes: int | None
    codes_read: int | None
    checkpoints: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def epoch(self) -> dict[str, float]:
        """FLOPs, hours and bytes of an epoch, over all devices; {} without images_per_epoch."""
        if self.images_per_epoch is None or self.codes_read is None:
            return {}
        steps = self.images_per_epoch // self.batch_size
        return {
            "steps": steps,
            "flops": steps * self.flops_per_step,
            "hours": self.hours[0] * steps / self.steps,
            "hours_at_worst": self.hours[1] * steps / self.steps,
            "codes_read": self.codes_read,
            "bank_looked_up": self.images_per_epoch * self.bank_per_image,
            "updates": steps * self.update_per_step * self.gpus,
            "network": steps * self.network_per_step * self.gpus,
        }


def train_budget(config: TrainConfig, gpus: int = 8, gpu: str = "H100") -> Budget:
    """The budget of a run.

    Raises ValueError for a GPU that is not in the table, or a batch that `gpus` cannot share.
    """
    if gpu not in PEAKS:
        raise ValueError(f"gpu {gpu!r}: expected one of {', '.join(PEAKS)}")
    if gpus < 1:
        raise ValueError(f"gpus {gpus}: expected at least 1")
    choose_parallelism(config, World(size=gpus, device=torch.device("cpu")))
    model = config.model
    with shapes_only():
        built = Transformer(model)
    cost = cost_of(built)
    block, root = _parameters(built)
    total, length = cost.parameters, model.seq_len
    tokens = min(config.micro_batch or config.batch_size, config.batch_size) * length
    sharded = config.distributed == "fsdp" and gpus > 1
    state = total * (WEIGHT + GRADIENT + MOMENTS + (AVERAGE if config.ema else 0))
    if sharded:
        # Two blocks and the root are gathered in bfloat16; gradients of a block and of the root
        # stand whole in bfloat16, then in float32 for the sum.
        state, copies = state // gpus, 2 * (2 * block + root) + 6 * (block + root)
    else:
        copies = 2 * total  # autocast keeps the matrices' bfloat16 copies for the backward pass
    activations = tokens * _activations(built, config.activation_checkpointing)
    head = _head(model, tokens)
    # Previews and validation gather whole float32 weights, when the rest is free again.
    working = max(copies + activations + head, total * WEIGHT if sharded else 0)
    images = IMAGENET_IMAGES if model.n_classes == IMAGENET_CLASSES else None
    passes = 4 if config.activation_checkpointing else 3
    flops = passes * cost.flops_per_token * length * config.batch_size
    others = (gpus - 1) / gpus
    # DDP: an all-reduce of float32 gradients; FSDP2: weights gathered in bfloat16 forward and
    # backward for every micro-batch, gradients scattered once in float32.
    parts = config.batch_size * length // tokens // gpus
    sent = others * total * ((4 * parts + 4) if sharded else 8)
    update = STEP_TRAFFIC * total / (gpus if sharded else 1)
    best, worst = (
        config.steps
        * (
            flops / (gpus * PEAKS[gpu] * SHARE_OF_PEAK[i])
            + update / (BANDWIDTH[gpu] * SHARE_OF_BANDWIDTH[i])
            + sent / LINK[i]
        )
        / 3600
        for i in range(2)
    )
    return Budget(
        gpus=gpus,
        gpu=gpu,
        peak=PEAKS[gpu],
        parameters=total,
        tokens=tokens,
        state=state,
        copies=copies,
        activations=activations,
        head=head,
        memory=state + working,
        flops_per_step=flops,
        hours=(best, worst),
        steps=config.steps,
        batch_size=config.batch_size,
        network_per_step=sent,
        update_per_step=update,
        images_per_epoch=images,
        bank_per_image=cost.bank_bytes_per_token * length,
        codes=codes_bytes(images, IMAGENET_VIEWS, length) if images else None,
        codes_read=codes_bytes(images, 1, length) if images else None,
        checkpoints=total * (WEIGHT + MOMENTS + AVERAGE) * (config.keep_checkpoints + 2)
        + total * WEIGHT,
    )


def _parameters(model: Transformer) -> tuple[int, int]:
    """Parameters of the largest block, and of all that is in no block."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers]
    return max(blocks), sum(p.numel() for p in model.parameters()) - sum(blocks)


def _activations(model: Transformer, checkpointing: bool) -> int:
    """Bytes per token kept for the backward pass: by the blocks, and the rows they share."""
    config = model.config
    blocks = [block_activations(config, block) for block in model.layers]
    rows = 2 * getattr(model.memory, "slots", 0) * getattr(model.memory, "value_width", 0)
    if checkpointing:
        return config.n_layer * 4 * config.width + max(blocks) + rows
    return sum(blocks) + rows


def _head(config: ModelConfig, tokens: int) -> int:
    """Bytes that the loss holds at once, in bfloat16 autocast (a test counts them).

    Of a chunk's logits the float32 ones and their log-softmax; the head in bfloat16, its gradient
    in float32, and the gradient of what goes into it.
    """
    logits = min(max(CHUNK, config.codebook_size), tokens * config.codebook_size)
    return 8 * logits + 6 * config.codebook_size * config.width + 4 * tokens * config.width


def block_activations(config: ModelConfig, block: Any) -> int:
    """Bytes per token that a block keeps for the backward pass, in bfloat16 autocast.

    The numbers are those that autograd counts for MHA and SwiGLU in eager mode (tests count them
    again); other kinds are assumed to need the same. CUDA's fused norms and dropout keep 10 bytes
    per unit of width less, a compiled block less again.
    """
    width, heads = config.width, config.n_head
    alike = swiglu_hidden(width, SwiGLUConfig())
    hidden = block.ffn.w1.out_features if isinstance(block.ffn, SwiGLU) else alike
    mixers = [module for module in block.modules() if isinstance(module, GatedMixer)]
    mixed = sum(4 * mixer.value_width + 4 * mixer.router.out_features for mixer in mixers)
    return 38 * width + 8 * hidden + 4 * heads + 8 + mixed


# --- saying it -----------------------------------------------------------------------------


def describe_budget(budget: Budget) -> str:
    """The budget as text, with its assumptions."""
    b = budget
    memory = {
        "weights, AdamW, EMA": b.state,
        "copies, gathered": b.copies,
        "activations": b.activations,
        "logits and loss": b.head,
    }
    lines = [f"memory per GPU        {_gb(b.memory):>15}  ({b.tokens:,} codes per pass)"]
    lines += [f"  {name:<20}{_gb(size):>15}" for name, size in memory.items()]
    lines += [
        f"FLOPs per step        {b.flops_per_step:>15.3g}  ({b.batch_size} images)",
        f"hours                 {_hours(*b.hours):>15}  ({b.steps:,} steps)",
        f"sent per step, GPU    {_gb(b.network_per_step):>15}",
        f"updates per step, GPU {_gb(b.update_per_step):>15}  (clipping, AdamW, EMA)",
        f"checkpoints on disk   {_gb(b.checkpoints):>15}",
    ]
    if b.codes is not None:
        lines.append(f"codes on disk         {_gb(b.codes):>15}  ({IMAGENET_VIEWS} views)")
    if epoch := b.epoch():
        lines.append(f"an epoch              {epoch['steps']:>15,.0f}  steps")
        lines.append(f"  FLOPs               {epoch['flops']:>15.3g}")
        lines.append(f"  hours               {_hours(epoch['hours'], epoch['hours_at_worst']):>15}")
        for key, name in (
            ("codes_read", "codes read"),
            ("bank_looked_up", "bank rows read"),
            ("updates", "updates"),
            ("network", "sent"),
        ):
            lines.append(f"  {name:<20}{_gb(epoch[key]):>15}")
    lines += [
        "",
        f"Assumed, not measured: {b.gpus} x {b.gpu}; products at {SHARE_OF_PEAK[0]:.0%} to "
        f"{SHARE_OF_PEAK[1]:.0%} of {b.peak / 1e12:.0f} TFLOP/s,",
        f"updates at {SHARE_OF_BANDWIDTH[0]:.0%} to {SHARE_OF_BANDWIDTH[1]:.0%} of "
        f"{BANDWIDTH[b.gpu] / 1e12:.3g} TB/s, communication hidden to {LINK[1] / 1e9:.0f} GB/s; "
        "eager mode, float32 weights with",
        "AdamW, bfloat16 arithmetic; 3 forward passes' FLOPs per step, 4 with activation "
        "checkpointing. CUDA's own memory (about 1 GB) is not counted.",
    ]
    return "\n".join(lines)


def comment(budget: Budget) -> str:
    """The budget as the comment of a config file."""
    b = budget
    disk = f"{_gb(b.checkpoints)} of checkpoints"
    if b.codes is not None:
        disk = f"{_gb(b.codes)} of codes, {disk}"
    return (
        f"# {b.gpus} x {b.gpu}, estimated (moveimg info --train): {_gb(b.memory)} per GPU, "
        f"{_hours(*b.hours)}\n# hours; on disk {disk}."
    )


def _gb(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def _hours(best: float, worst: float) -> str:
    return " to ".join(f"{x:.0f}" if x >= 100 else f"{x:.2g}" for x in (best, worst))
