"""Public weights and other models as model directories: converted, downloaded, shared.

`llamagen` reads LlamaGen's generators, `upcycle` gives a dense model a value memory, `hub` finds
models by name, and `share` publishes one with its card.
"""
