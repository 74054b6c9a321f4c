"""moveimg: images from class labels, one code after another, with a Mixture of Value Embeddings.

from moveimg import Pipeline
images = Pipeline.from_pretrained("digits").sample(["seven", 3], seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]

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
