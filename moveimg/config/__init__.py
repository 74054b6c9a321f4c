"""Every setting of the program, with its default, its range and its help text."""

from moveimg.config.files import read_yaml
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
    "load_config",
    "read_yaml",
]
