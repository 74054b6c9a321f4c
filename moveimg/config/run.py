"""Every setting of the program, described once, beside its default.

A run is one YAML file (files.py reads it). Unknown keys are errors. The generator's own
settings are in model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from moveimg.config.files import read_yaml
from moveimg.config.model import Config, ModelConfig, Rate
from moveimg.errors import validate

Probability = Annotated[float, Field(ge=0, le=1)]


# --- sampling ------------------------------------------------------------------------------


class SamplingSettings(Config):
    """How codes are drawn from logits; a model's own defaults stand in its `sampling.json`."""

    cfg_scale: NonNegativeFloat = Field(
        1.0,
        le=1000,
        description="classifier-free guidance: logits = uncond + (cond - uncond) * cfg_scale; "
        "1 is no guidance, 0 ignores the class",
    )
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = Field(
        "constant", description="how guidance grows from 1 to cfg_scale along the codes"
    )
    cfg_power: PositiveFloat = Field(
        2.75, description="exponent of the power-cosine schedule; larger guides later"
    )
    cfg_start: Rate = Field(
        0.0, description="fraction of the codes drawn without guidance before it starts"
    )
    temperature: NonNegativeFloat = Field(1.0, description="divides the logits; 0 is greedy")

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"expected 0 (greedy) or at least 0.0001 (got {value})")
        return value

    top_k: NonNegativeInt = Field(0, description="keep the k likeliest codes; 0 keeps all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep the smallest set of codes whose probability reaches p"
    )


# --- training ------------------------------------------------------------------------------

Crops = Literal["center", "flip", "five", "ten"]


class ImagesConfig(Config):
    """Where images come from and how they are cut."""

    source: str = Field(description="a folder of class subfolders, or a data set")
    val_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the training images held out as the validation split; left out: the "
        "source's own validation or test split, or 0.2 of a folder without one",
    )
    size: PositiveInt = Field(256, description="pixels of a side")
    crops: Crops = Field("center", description="views of an image: center, flip, five or ten crops")
    ranges: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (1.0,), min_length=1, description="each view is cut from size * range pixels"
    )


class DataConfig(Config):
    """What the generator is trained on: codes made by `moveimg encode`, or images."""

    codes: Path | None = Field(None, description="packed codes, with train/ and val/ in it")
    images: ImagesConfig | None = Field(None, description="images to encode first, once")
    tokenizer: Path = Field(description="directory of the tokenizer (or of a model holding one)")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.codes is None) == (self.images is None):
            raise ValueError("give either `codes` (packed codes) or `images`, one of the two")
        return self


class OptimizerConfig(Config):
    """AdamW or Muon; weight decay falls on tensors of two or more dimensions only."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: torch's Muon for the matrices of the blocks, AdamW for all else; the "
        "same lr and weight_decay serve both (arXiv 2502.16982)",
    )
    lr: PositiveFloat = Field(1e-4, description="peak learning rate (LlamaGen: 1e-4 a 256 images)")
    betas: tuple[Rate, Rate] = Field((0.9, 0.95), description="Adam's moment decays")
    momentum: Rate = Field(0.95, description="Muon's momentum")
    weight_decay: NonNegativeFloat = Field(0.05, description="decoupled weight decay")
    clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    warmup: NonNegativeInt = Field(0, description="steps of linear warm-up")
    final_lr: Probability = Field(0.0, description="end of the cosine, as a share of lr")
    table_lr: PositiveFloat = Field(
        10.0, description="factor on lr for product-key value tables (arXiv 2412.09764)"
    )
    table_clip: PositiveFloat = Field(
        1.0, description="largest norm of those tables' gradient, clipped apart from the rest"
    )


class RunConfig(Config):
    """What training a generator and training a tokenizer share."""

    out: Path = Field(description="the directory to make")
    seed: NonNegativeInt = Field(0, description="seeds weights, data order and dropout")
    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(256, description="images a step, over all processes")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9999, description="decay of the weights' moving average, warmed up; 0 turns it off"
    )
    log_every: PositiveInt = Field(20, description="steps between log lines")
    validate_every: PositiveInt = Field(500, description="steps between held-out losses")
    preview_every: PositiveInt = Field(1000, description="steps between preview pictures")
    checkpoint_every: PositiveInt = Field(500, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints to keep; the best one stays beside them"
    )
    wandb: bool = Field(
        False, description="send what goes to TensorBoard to Weights & Biases, too (moveimg[wandb])"
    )


class EvaluationConfig(Config):
    """Scores of a small set of samples while training, by `moveimg evaluate`'s own functions."""

    every: PositiveInt = Field(description="steps between scores; the last step has them, too")
    images: int = Field(1000, ge=4, description="samples; FID compares at one number of them only")
    reference: str = Field(description="imagenet256, an .npz of real training images, or `digits`")
    extractor: Path | None = Field(
        None, description="a classifier of --make-extractor; for `digits` the bundled one"
    )
    inception_weights: Path | None = Field(
        None, description="in torch-fidelity's layout; left out: downloaded on first use"
    )


class TrainConfig(RunConfig):
    """`moveimg train CONFIG`: one generator."""

    data: DataConfig
    model: ModelConfig
    init_from: Path | None = Field(
        None,
        description="start from this model's weights (a directory or a name); settings of `model` "
        "that are left out are its own",
    )
    train: Literal["all", "memory"] = Field(
        "all", description="what learns: everything, or the value memory (bank and routers) alone"
    )
    class_dropout: Probability = Field(
        0.1, description="share of labels replaced by the null label, for guidance"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="autocast type of the forward pass; auto: bfloat16 on CUDA from capability 8.0",
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="images in one pass; a step adds up the gradients of batch_size / micro_batch "
        "of them, shared by the processes; left out: the whole batch",
    )
    distributed: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: whole weights in each, or weights cut (FSDP2)"
    )
    activation_checkpointing: bool = Field(
        False, description="compute a block's activations again in the backward pass: less memory"
    )
    compile: bool = Field(False, description="torch.compile each block for training")
    sampling: SamplingSettings = Field(
        SamplingSettings(), description="for previews, and the model's `sampling.json`"
    )
    evaluation: EvaluationConfig | None = Field(
        None, description="FID and its company now and then, to TensorBoard"
    )

    @model_validator(mode="after")
    def _memory_alone_needs_a_backbone(self) -> TrainConfig:
        if self.train == "memory" and self.init_from is None:
            raise ValueError("train: memory needs `init_from`: there is no trained backbone")
        return self


class AdversarialConfig(Config):
    """A PatchGAN that judges reconstructions (VQGAN, arXiv 2012.09841)."""

    weight: PositiveFloat = Field(
        0.8, description="of the adversarial loss (taming: 0.8; LlamaGen: 0.5, not adaptive)"
    )
    adaptive: bool = Field(
        True,
        description="times |gradient of the other losses| / |its own| at the decoder's last layer",
    )
    start: NonNegativeInt = Field(
        20_000, description="the step at which it begins to learn and to judge (LlamaGen: 20000)"
    )
    lr: PositiveFloat = Field(1e-4, description="its rate, under the run's warm-up and schedule")
    width: PositiveInt = Field(64, description="channels of its first layer")
    n_layers: PositiveInt = Field(
        3, description="layers that halve the resolution after the first; a patch of 3 is 70 pixels"
    )


class TokenizerTrainConfig(RunConfig):
    """`moveimg train-tokenizer CONFIG`: one tokenizer. No class label enters it."""

    images: ImagesConfig
    tokenizer: dict[str, Any] = Field(description="the tokenizer's own config (see tokenizer/)")
    l1_weight: NonNegativeFloat = Field(0.0, description="weight of |x - y|")
    l2_weight: NonNegativeFloat = Field(1.0, description="weight of (x - y)^2")
    perceptual_weight: NonNegativeFloat = Field(
        0.0, description="weight of LPIPS (LlamaGen, taming: 1); fetches 528 MiB at its first use"
    )
    perceptual_folder: Path | None = Field(
        None,
        description="torch.hub folder with LPIPS's weights in its checkpoints/; left out: torch's "
        "own, ~/.cache/torch/hub",
    )
    adversarial: AdversarialConfig | None = Field(None, description="left out: no discriminator")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="autocast type of the forward pass"
    )


class ModelFile(BaseModel):
    """Any run's YAML, of which only the model matters."""

    model: ModelConfig


# --- files ---------------------------------------------------------------------------------

C = TypeVar("C", bound=BaseModel)


def load_config(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a YAML file with its bases and `key.path=value` overrides into `cls`.

    Raises FileNotFoundError for a missing file, ValueError for anything wrong in it.
    """
    return validate(cls, read_yaml(path, overrides), str(path))
