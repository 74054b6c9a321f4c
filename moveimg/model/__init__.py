"""The generator: a class-conditional transformer with slots for attention, memory, feed-forward."""

from moveimg.model.cross_entropy import CHUNK
from moveimg.model.inference import StaticTransformer, decoding_model, linear_kind
from moveimg.model.memory import (
    NEAR_TWO,
    NEAR_ZERO,
    GatedMixer,
    Mixing,
    ValueBank,
    mixers_by_layer,
    record_mixing,
)
from moveimg.model.moe import MoE, shares
from moveimg.model.product_key import ValueTable
from moveimg.model.rope import rope_2d
from moveimg.model.swiglu import SwiGLU, swiglu_hidden
from moveimg.model.transformer import Cache, Transformer

__all__ = [
    "CHUNK",
    "NEAR_TWO",
    "NEAR_ZERO",
    "Cache",
    "GatedMixer",
    "Mixing",
    "MoE",
    "StaticTransformer",
    "SwiGLU",
    "Transformer",
    "ValueBank",
    "ValueTable",
    "decoding_model",
    "linear_kind",
    "mixers_by_layer",
    "record_mixing",
    "rope_2d",
    "shares",
    "swiglu_hidden",
]
