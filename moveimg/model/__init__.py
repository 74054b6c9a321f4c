"""The generator: a class-conditional transformer with slots for attention, memory, feed-forward."""

from moveimg.model.cost import model_cost, token_flops, train_budget
from moveimg.model.inference import decoding_model
from moveimg.model.memory import GatedMixer, ValueBank, mixers_by_layer, record_mixing
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
    "decoding_model",
    "mixers_by_layer",
    "model_cost",
    "record_mixing",
    "swiglu_hidden",
    "token_flops",
    "train_budget",
]
