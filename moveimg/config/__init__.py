"""Every setting of the program, with its default, its range and its help text."""

from moveimg.config.files import SUFFIXES, list_recipes, override, yaml_of
from moveimg.config.model import SIZES, Config, ModelConfig, SamplingSettings, SwiGLUConfig
from moveimg.config.run import (
    ImagesConfig,
    ModelFile,
    OptimizerConfig,
    RunConfig,
    Size,
    TokenizerTrainConfig,
    TrainConfig,
    as_pair,
    load_config,
    parse_size,
)

__all__ = [
    "SIZES", "SUFFIXES", "Config", "ImagesConfig", "ModelConfig", "ModelFile",
    "OptimizerConfig", "RunConfig", "SamplingSettings", "Size", "SwiGLUConfig",
    "TokenizerTrainConfig", "TrainConfig", "as_pair", "list_recipes", "load_config", "override",
    "parse_size", "yaml_of",
]  # fmt: skip
