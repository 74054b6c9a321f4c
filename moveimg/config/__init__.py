"""Every setting of the program, with its default, its range and its help text."""

# ruff: noqa: F401 (re-exports)
from moveimg.config.model import SIZES, Config, ModelConfig, SamplingSettings, SwiGLUConfig
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
    list_recipes,
    load_config,
    override,
    parse_size,
    yaml_of,
)
