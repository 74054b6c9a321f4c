"""Every setting of the program, with its default, its range and its help text."""

# ruff: noqa: F401 (re-exports)
from moveimg.config.model import SIZES, Config, ModelConfig, SwiGLUConfig
from moveimg.config.run import (
    SUFFIXES,
    AdversarialConfig,
    ImagesConfig,
    ModelFile,
    OptimizerConfig,
    RunConfig,
    Size,
    TokenizerTrainConfig,
    TrainConfig,
    as_pair,
    format_recipe,
    list_recipes,
    load_config,
    override,
    parse_size,
)
from moveimg.config.sampling import SamplingSettings
