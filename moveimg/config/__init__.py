"""Every setting of the program, with its default, its range and its help text."""

from moveimg.config.files import SUFFIXES, is_recipe, read_yaml, yaml_of
from moveimg.config.model import SIZES, Config, ModelConfig, SwiGLUConfig
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
from moveimg.config.sampling import SamplingOptions, SamplingSettings

__all__ = [
    "SIZES",
    "SUFFIXES",
    "Config",
    "ImagesConfig",
    "ModelConfig",
    "ModelFile",
    "OptimizerConfig",
    "RunConfig",
    "SamplingOptions",
    "SamplingSettings",
    "Size",
    "SwiGLUConfig",
    "TokenizerTrainConfig",
    "TrainConfig",
    "as_pair",
    "is_recipe",
    "load_config",
    "parse_size",
    "read_yaml",
    "yaml_of",
]
