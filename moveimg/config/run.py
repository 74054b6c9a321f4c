"""Settings of training runs, and reading of their YAML files and recipes.

A file may name another file or a recipe as its `base:`, whose keys it overrides. On the command
line `--set model.memory.slots=6` overrides a key by its dotted path. A recipe is a file in
configs/, or composed by name: the name of a recipe and a further part, as in FORMS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, model_validator

from moveimg.config.model import Config, MLAConfig, ModelConfig, Rate, Width
from moveimg.config.sampling import SamplingSettings
from moveimg.errors import shorten, validate
from moveimg.files import parse_yaml, read_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" if (ROOT / "configs").is_dir() else ROOT.parent / "configs"  # a checkout
SUFFIXES = (".yaml", ".yml")
MODELS = {"digits": "digits-move", "fashion": "fashion-move"}  # the bundled models' recipes
FORMS = {
    "imagenet-{b,l,xl,xxl,3b}-{256,384}": "A LlamaGen size at 256 or 384 pixels; append to it:",
    "...-mla": "latent attention;",
    "...-standard": "no value memory;",
    "...-lave-{x1,x2}": "LaVE, a table on every second layer or on all;",
    "...-move-{x1,x2,x4,...}": "MoVE, n_layer / 2 slots times the number.",
}
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
GradientNorm = Annotated[float, Field(gt=0, le=1e9)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
StepsFromZero = Annotated[int, Field(ge=0, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=10**6)]
Side = Annotated[int, Field(ge=1, le=4096)]
Size = Side | tuple[Side, Side]  # pixels of a square's side, or (height, width)
Crops = Literal["center", "flip", "five", "ten"]


def as_pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def parse_size(text: str) -> Size:
    """Parse `256`, or `HEIGHTxWIDTH` such as `192x256`. Raises ValueError for another form."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides) or len(sides) > 2:
        raise ValueError(f"size {text!r}: expected 1..4096 pixels, or HEIGHTxWIDTH")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class ImagesConfig(Config):
    """Settings of an image source and its crops."""

    source: str = Field(description="a folder with a subfolder per class, or a data set")
    size: Size = Field(256, description="pixels of a square's side, or [height, width]")
    crops: Crops = Field("center", description="views per image: center, flip, five or ten crops")
    ranges: tuple[Annotated[float, Field(ge=1, le=16)], ...] = Field(
        (1.0,), min_length=1, max_length=64, description="crop each view from size * range pixels"
    )
    val_fraction: float | None = Field(None, gt=0, lt=1, description="share to hold out as val")


class DataConfig(Config):
    """The generator's training data: codes that `moveimg encode` wrote, or images."""

    codes: Path | None = Field(None, description="folder of packed codes in train/ and val/")
    images: ImagesConfig | None = Field(None, description="images, encoded once before training")
    tokenizer: Path = Field(description="directory of a tokenizer, or of a model with one")

    @model_validator(mode="after")
    def _check_one_source(self) -> DataConfig:
        if (self.codes is None) == (self.images is None):
            raise ValueError(f"codes {self.codes}: expected one of `codes` and `images`")
        return self


class OptimizerConfig(Config):
    """Settings of AdamW or Muon; only weights of two or more dimensions are decayed."""

    kind: Literal["adamw", "muon"] = Field("adamw", description="muon: for blocks' matrices only")
    lr: LearningRate = Field(1e-4, description="peak learning rate (LlamaGen: 1e-4 per 256 images)")
    betas: tuple[Rate, Rate] = Field((0.9, 0.95), description="Adam's moment decays")
    momentum: Rate = Field(0.95, description="Muon's momentum")
    weight_decay: float = Field(0.05, ge=0, le=100, description="decoupled weight decay")
    clip: GradientNorm = Field(1.0, description="maximum gradient norm")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of lr after warm-up")
    warmup: StepsFromZero = Field(0, description="steps of linear warm-up")
    final_lr: Share = Field(0.0, description="lr at the end of the cosine, as a share of lr")
    table_lr: LearningRate = Field(1e-3, description="lr of product-key value tables (Memory+)")
    table_clip: GradientNorm = Field(1.0, description="maximum gradient norm of the value tables")


class RunConfig(Config):
    """Settings common to training a generator and training a tokenizer."""

    out: Path = Field(description="the directory of the run")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seeds weights, data order and dropout")
    steps: Steps = Field(description="optimizer steps")
    batch_size: BatchSize = Field(256, description="images per step, over all processes")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Rate = Field(0.9999, description="decay of the weights' moving average; 0: no average")
    log_every: Steps = Field(20, description="steps between log lines")
    validate_every: Steps = Field(500, description="steps between validation losses")
    preview_every: Steps = Field(1000, description="steps between preview images")
    checkpoint_every: Steps = Field(500, description="steps between checkpoints")
    keep_checkpoints: Steps = Field(2, description="newest checkpoints to keep")
    wandb: bool = Field(False, description="also log to Weights & Biases (moveimg[wandb])")


class TrainConfig(RunConfig):
    """Settings of `moveimg train CONFIG`, which trains a generator."""

    data: DataConfig
    model: ModelConfig
    init_from: Path | None = Field(None, description="initial model; its settings are defaults")
    train: Literal["all", "memory"] = Field("all", description="memory: only bank and routers")
    class_dropout: Share = Field(0.1, description="probability of the null label, for guidance")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast dtype; auto: bfloat16 on CUDA from capability 8.0"
    )
    micro_batch: BatchSize | None = Field(None, description="images per micro-batch; null: all")
    distributed: Literal["ddp", "fsdp"] = Field("ddp", description="replicated or sharded weights")
    activation_checkpointing: bool = Field(False, description="recompute activations in backward")
    compile: bool = Field(False, description="torch.compile each block for training")
    sampling: SamplingSettings = Field(SamplingSettings(), description="of previews and exports")
    memory_every: StepsFromZero = Field(
        0, description="steps between logs of gates and bank gradients; 0: never (not with fsdp)"
    )

    @model_validator(mode="after")
    def _check_memory(self) -> TrainConfig:
        if self.memory_every and self.distributed == "fsdp":
            raise ValueError(f"memory_every {self.memory_every}: expected 0 with a bank in shards")
        if self.train == "memory" and self.init_from is None:
            raise ValueError("train: memory needs `init_from`, a model with a trained backbone")
        return self


class AdversarialConfig(Config):
    """Settings of the PatchGAN discriminator (VQGAN, arXiv 2012.09841)."""

    weight: float = Field(0.8, gt=0, le=1e6, description="weight of the adversarial loss")
    adaptive: bool = Field(True, description="scale weight by gradient norms (VQGAN, equation 7)")
    start: StepsFromZero = Field(20_000, description="first step of adversarial training")
    lr: LearningRate = Field(1e-4, description="peak learning rate, under the run's schedule")
    width: Width = Field(64, description="channels of the first layer")
    n_layers: int = Field(3, ge=1, le=8, description="strided layers; 3: patches of 70 pixels")


class TokenizerTrainConfig(RunConfig):
    """Settings of `moveimg train-tokenizer CONFIG`, which trains a tokenizer without labels."""

    images: ImagesConfig
    tokenizer: dict[str, Any] = Field(description="settings as in tokenizer/config.py")
    init_from: Path | None = Field(None, description="tokenizer to start from, with its settings")
    l1_weight: Weight = Field(0.0, description="weight of |x - y|")
    l2_weight: Weight = Field(1.0, description="weight of (x - y)^2")
    perceptual_weight: Weight = Field(0.0, description="weight of LPIPS (LlamaGen, taming: 1)")
    perceptual_folder: Path | None = Field(None, description="torch.hub folder of LPIPS weights")
    adversarial: AdversarialConfig | None = Field(None, description="null: no discriminator")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="autocast dtype")


class ModelFile(BaseModel):
    """The `model` of a training run's YAML; other keys are ignored."""

    model: ModelConfig


C = TypeVar("C", bound=BaseModel)


def load_config(path: str | Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read the settings of a YAML file or recipe, its bases and `key.path=value` overrides.

    Raises FileNotFoundError for a missing file, ValueError for invalid content.
    """
    return validate(cls, override(read_settings(str(path)), overrides), str(path))


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return settings with `key.path=value` overrides applied; values are YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {text[:60]}: expected KEY=VALUE")
        nested: Any = parse_yaml(value, f"--set {text[:60]}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def list_recipes() -> dict[str, str]:
    """Map names of recipes to one-line descriptions: bundled models, files, then FORMS."""
    models = {name: f"The bundled model {name}: {recipe}." for name, recipe in MODELS.items()}
    paths = sorted(CONFIGS.glob("*.yaml"))
    abouts = {path.stem: path.read_text("utf-8").partition("\n")[0][2:].strip() for path in paths}
    return models | abouts | FORMS


def format_recipe(name: str) -> str:
    """Return a recipe as YAML: the text of its file, or all settings of a composed recipe.

    Raises FileNotFoundError for an unknown name.
    """
    if path := _find_recipe(name):
        return path.read_text(encoding="utf-8")
    return yaml.safe_dump(read_settings(name), sort_keys=False, default_flow_style=None)


def _find_recipe(name: str) -> Path | None:
    path = CONFIGS / f"{name}.yaml"
    return path if re.fullmatch("[a-z0-9-]{1,100}", name) and path.is_file() else None


def read_settings(source: str, folder: Path = Path(), depth: int = 0) -> dict[str, Any]:
    """Read the settings, with bases, of a file (relative to `folder`) or of a recipe."""
    path = folder / source
    if not (path.is_file() or source.endswith(SUFFIXES)):
        path = _find_recipe(source) or Path(source)
    is_file = path.is_file() or source.endswith(SUFFIXES)
    data = read_yaml(path) if is_file else _compose(source)
    base = data.pop("base", None) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(base, str | None):
        got = shorten(base)
        raise ValueError(f"{path}: expected a mapping, `base` a file or recipe (got {got})")
    if depth > 20:
        raise ValueError(f"{path}: `base` includes itself, expected no cycle")
    return data if base is None else _merge(read_settings(base, path.parent, depth + 1), data)


def _merge(base: Any, over: Any) -> Any:
    """Merge `over` into `base` by key; a group with another `kind` is replaced as a whole."""
    both = isinstance(base, dict) and isinstance(over, dict)
    if not both or over.get("kind", base.get("kind")) != base.get("kind"):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def _compose(name: str) -> dict[str, Any]:
    """Return the settings of a composed name: its `base`, and the changes of its last part."""
    if name in MODELS:
        return {"base": MODELS[name]}
    if match := re.fullmatch(r"imagenet-(b|l|xl|xxl|3b)-(256|384)", name):
        settings: dict[str, Any] = {"model": {"size": match[1].upper()}}
        if match[1] not in ("b", "l"):
            settings |= {"distributed": "fsdp", "activation_checkpointing": True}
        return {"base": f"imagenet-{match[2]}", "out": f"runs/{name}", **settings}
    part = r"(?:(mla|standard)|(lave|move)(?:-x([1-9]\d{0,2}))?)"
    match = re.fullmatch(rf"([a-z0-9-]{{1,90}}?)-{part}", name)
    base = match[1] if match else ""
    if match and _find_recipe(base) is None and _find_recipe(f"{base}-base"):
        base = f"{base}-base"
    data = read_settings(base, Path()) if base else {}
    if match is None or "model" not in data:
        raise FileNotFoundError(
            f"no config {shorten(name)}: expected a YAML file or a recipe (see `moveimg configs`)"
        )
    model, scale = validate(ModelConfig, data["model"], base), int(match[4] or 1)
    attention = model.attention
    value_width = attention.kv_rank if isinstance(attention, MLAConfig) else model.width
    slots = round(scale * model.n_layer * model.width / (2 * value_width))
    changes: dict[str, dict[str, Any]] = {
        "mla": {"kind": "mla", "kv_rank": model.width // 4, "rope_dim": model.head_dim // 8 * 4},
        "standard": {"kind": "none"},
        "lave": {"kind": "lave", "layers": {1: "alternate", 2: "all"}.get(scale, scale)},
        "move": {"kind": "move", "slots": max(1, slots)},
    }
    slot, change = "attention" if match[2] == "mla" else "memory", changes[match[2] or match[3]]
    return {"base": base, "out": f"runs/{name}", "model": {slot: change}}
