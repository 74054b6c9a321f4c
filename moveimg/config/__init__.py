"""Every setting of the program, with its default, its range and its help text."""

from moveimg.config.files import SUFFIXES, is_recipe, read_yaml, yaml_of
from moveimg.config.model import SIZES, Config, ModelConfig, SwiGLUConfig
from moveimg.config.run import (
    EvaluationConfig,
    ImagesConfig,
    ModelFile,
    OptimizerConfig,
    RunConfig,
    TokenizerTrainConfig,
    TrainConfig,
    load_config,
)
from moveimg.config.sampling import SamplingOptions, SamplingSettings

__all__ = [
    "SIZES",
    "SUFFIXES",
    "Config",
    "EvaluationConfig",
    "ImagesConfig",
    "ModelConfig",
    "ModelFile",
    "OptimizerConfig",
    "RunConfig",
    "SamplingOptions",
    "SamplingSettings",
    "SwiGLUConfig",
    "TokenizerTrainConfig",
    "TrainConfig",
    "is_recipe",
    "load_config",
    "read_yaml",
    "yaml_of",
]
