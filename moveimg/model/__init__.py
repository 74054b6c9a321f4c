"""The generator: a class-conditional transformer with slots for attention, memory, feed-forward."""

from moveimg.model.cost import model_cost, token_flops, train_budget
from moveimg.model.inference import prepare_for_sampling
from moveimg.model.memory import GatedMixer, ValueBank, hook_mixers, mixers_by_layer
from moveimg.model.moe import MoE
from moveimg.model.product_keys import ValueTable
from moveimg.model.swiglu import swiglu_hidden
from moveimg.model.transformer import Transformer

__all__ = [
    "GatedMixer",
    "MoE",
    "Transformer",
    "ValueBank",
    "ValueTable",
    "hook_mixers",
    "mixers_by_layer",
    "model_cost",
    "prepare_for_sampling",
    "swiglu_hidden",
    "token_flops",
    "train_budget",
]
