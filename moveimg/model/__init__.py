"""The generator: a class-conditional transformer with slots for attention, memory, feed-forward."""

from moveimg.model.attention import rope_2d
from moveimg.model.budget import DEVICES, comment, describe_budget, train_budget
from moveimg.model.cost import describe_cost, model_cost, token_flops
from moveimg.model.feedforward import MoE, ValueTable, swiglu_hidden
from moveimg.model.inference import decoding_model, linear_kind
from moveimg.model.memory import (
    NEAR_TWO,
    NEAR_ZERO,
    GatedMixer,
    Mixing,
    ValueBank,
    mixers_by_layer,
    record_mixing,
)
from moveimg.model.transformer import Transformer

__all__ = [
    "DEVICES",
    "NEAR_TWO",
    "NEAR_ZERO",
    "GatedMixer",
    "Mixing",
    "MoE",
    "Transformer",
    "ValueBank",
    "ValueTable",
    "comment",
    "decoding_model",
    "describe_budget",
    "describe_cost",
    "linear_kind",
    "mixers_by_layer",
    "model_cost",
    "record_mixing",
    "rope_2d",
    "swiglu_hidden",
    "token_flops",
    "train_budget",
]
