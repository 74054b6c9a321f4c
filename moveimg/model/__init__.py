"""The generator: a class-conditional transformer with three slots.

`attention`, `memory` and `ffn` are each chosen by the `kind` in the config, from the one table
that stands at the end of their file.
"""

from moveimg.model.transformer import Cache, Transformer

__all__ = ["Cache", "Transformer"]
