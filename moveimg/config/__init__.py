"""Every setting of the program, with its default, its range and its help text."""

# ruff: noqa: F401 (the package's names)
from moveimg.config.files import SUFFIXES, list_recipes, override, yaml_of
from moveimg.config.model import SIZES, Config, ModelConfig, SamplingSettings, SwiGLUConfig
from moveimg.config.run import (
    AdversarialConfig,
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
