"""moveimg: autoregressive image generation with a Mixture of Value Embeddings (MoVE).

from moveimg import Pipeline
images = Pipeline.from_pretrained("fashion").sample(["sneaker", 3], seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["DEFAULT_MODEL", "Pipeline", "__version__"]

DEFAULT_MODEL = "fashion"  # bundled

if TYPE_CHECKING:
    from moveimg.pipeline import Pipeline


def __getattr__(name: str) -> Any:
    """Import Pipeline, and torch with it, at first use."""
    if name == "Pipeline":
        from moveimg.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'moveimg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
