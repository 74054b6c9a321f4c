"""The settings of training runs. A run is one YAML file; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, model_validator

from moveimg.config.files import read_yaml
from moveimg.config.model import Config, ModelConfig, Rate, SamplingSettings, Width
from moveimg.errors import validate

Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
GradientNorm = Annotated[float, Field(gt=0, le=1e9)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
StepsFromZero = Annotated[int, Field(ge=0, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=10**6)]
Side = Annotated[int, Field(ge=1, le=4096)]
Size = Side | tuple[Side, Side]  # of a square, or (height, width), in pixels
Crops = Literal["center", "flip", "five", "ten"]


def as_pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def parse_size(text: str) -> Size:
    """The size of `256`, or of `HEIGHTxWIDTH` such as `192x256`. Raises ValueError for others."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides) or len(sides) > 2:
        raise ValueError(f"size {text!r}: expected 1..4096 pixels, or HEIGHTxWIDTH")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class ImagesConfig(Config):
    """Where images come from and how they are cropped."""

    source: str = Field(description="a folder of class subfolders, or a data set")
    size: Size = Field(256, description="pixels of a square's side, or [height, width]")
    crops: Crops = Field("center", description="views of an image: center, flip, five or ten crops")
    ranges: tuple[Annotated[float, Field(ge=1, le=16)], ...] = Field(
        (1.0,), min_length=1, max_length=64, description="each view is cut from size * range pixels"
    )
    val_fraction: float | None = Field(None, gt=0, lt=1, description="share to hold out, if any")


class DataConfig(Config):
    """The generator's training data: codes made by `moveimg encode`, or images."""

    codes: Path | None = Field(None, description="packed codes, with train/ and val/ in it")
    images: ImagesConfig | None = Field(None, description="images to encode first, once")
    tokenizer: Path = Field(description="directory of the tokenizer (or a model holding one)")

    @model_validator(mode="after")
    def _check_one_source(self) -> DataConfig:
        if (self.codes is None) == (self.images is None):
            raise ValueError("give either `codes` (packed codes) or `images`, one of the two")
        return self


class OptimizerConfig(Config):
    """AdamW or Muon; weight decay falls on tensors of two or more dimensions only."""

    kind: Literal["adamw", "muon"] = Field("adamw", description="muon: of the blocks' matrices")
    lr: LearningRate = Field(1e-4, description="peak learning rate (LlamaGen: 1e-4 per 256 images)")
    betas: tuple[Rate, Rate] = Field((0.9, 0.95), description="Adam's moment decays")
    momentum: Rate = Field(0.95, description="Muon's momentum")
    weight_decay: float = Field(0.05, ge=0, le=100, description="decoupled weight decay")
    clip: GradientNorm = Field(1.0, description="largest norm of the gradient")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    warmup: StepsFromZero = Field(0, description="steps of linear warm-up")
    final_lr: Probability = Field(0.0, description="end of the cosine, as a share of lr")
    table_lr: LearningRate = Field(1e-3, description="of product-key value tables (Memory+)")
    table_clip: GradientNorm = Field(1.0, description="largest norm of the value tables' gradient")


class RunConfig(Config):
    """Settings that training a generator and training a tokenizer share."""

    out: Path = Field(description="the directory to make")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seeds weights, data order and dropout")
    steps: Steps = Field(description="optimizer steps")
    batch_size: BatchSize = Field(256, description="images per step, over all processes")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Rate = Field(0.9999, description="decay of the weights' moving average; 0: no average")
    log_every: Steps = Field(20, description="steps between log lines")
    validate_every: Steps = Field(500, description="steps between held-out losses")
    preview_every: Steps = Field(1000, description="steps between preview images")
    checkpoint_every: Steps = Field(500, description="steps between checkpoints")
    keep_checkpoints: Steps = Field(2, description="newest checkpoints to keep")
    wandb: bool = Field(False, description="log to Weights & Biases, too (moveimg[wandb])")


class TrainConfig(RunConfig):
    """`moveimg train CONFIG`: one generator."""

    data: DataConfig
    model: ModelConfig
    init_from: Path | None = Field(None, description="start from this model (and its settings)")
    train: Literal["all", "memory"] = Field("all", description="memory: bank and routers alone")
    class_dropout: Probability = Field(0.1, description="share of null labels, for guidance")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast type; auto: bfloat16 on CUDA from capability 8.0"
    )
    micro_batch: BatchSize | None = Field(None, description="images per forward pass (accumulated)")
    distributed: Literal["ddp", "fsdp"] = Field("ddp", description="replicated or sharded weights")
    activation_checkpointing: bool = Field(False, description="less memory, one more forward pass")
    compile: bool = Field(False, description="torch.compile each block for training")
    sampling: SamplingSettings = Field(SamplingSettings(), description="of previews, and saved")
    memory_every: StepsFromZero = Field(
        0, description="steps between records of gates and the bank's gradients; 0: none (not fsdp)"
    )

    @model_validator(mode="after")
    def _check_memory(self) -> TrainConfig:
        if self.memory_every and self.distributed == "fsdp":
            raise ValueError("memory_every: the bank of a sharded model is on no device whole")
        if self.train == "memory" and self.init_from is None:
            raise ValueError("train: memory needs `init_from`: there is no trained backbone")
        return self


class AdversarialConfig(Config):
    """A PatchGAN that judges reconstructions (VQGAN, arXiv 2012.09841)."""

    weight: float = Field(0.8, gt=0, le=1e6, description="weight of its loss (taming: 0.8)")
    adaptive: bool = Field(True, description="scale by |other gradients| / |its own|, last layer")
    start: StepsFromZero = Field(20_000, description="step from which it learns and is used")
    lr: LearningRate = Field(1e-4, description="peak learning rate, under the run's schedule")
    width: Width = Field(64, description="channels of its first layer")
    n_layers: int = Field(3, ge=1, le=8, description="halving layers; with 3, a patch is 70 pixels")


class TokenizerTrainConfig(RunConfig):
    """`moveimg train-tokenizer CONFIG`: one tokenizer, trained without class labels."""

    images: ImagesConfig
    tokenizer: dict[str, Any] = Field(description="the tokenizer's own config (see tokenizer/)")
    init_from: Path | None = Field(None, description="start from this tokenizer (and its settings)")
    l1_weight: Weight = Field(0.0, description="weight of |x - y|")
    l2_weight: Weight = Field(1.0, description="weight of (x - y)^2")
    perceptual_weight: Weight = Field(0.0, description="weight of LPIPS (LlamaGen, taming: 1)")
    perceptual_folder: Path | None = Field(None, description="LPIPS's torch.hub folder")
    adversarial: AdversarialConfig | None = Field(None, description="the discriminator")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="autocast type")


class ModelFile(BaseModel):
    """Any run's YAML, read for its model alone."""

    model: ModelConfig


C = TypeVar("C", bound=BaseModel)


def load_config(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a YAML file with its bases and `key.path=value` overrides into `cls`.

    Raises FileNotFoundError for a missing file, ValueError for anything wrong in it.
    """
    return validate(cls, read_yaml(path, overrides), str(path))
