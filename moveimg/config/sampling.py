"""The sampling settings, declared once.

The command line, the Python API, the HTTP API and the page take names, ranges, defaults and help
texts from the fields of SamplingSettings.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from pydantic import Field, field_validator

from moveimg.config.model import Config, Rate

Schedule = Literal["constant", "linear", "power-cosine"]


class SamplingSettings(Config):
    """How codes are drawn from logits; a model's own defaults are in its `sampling.json`."""

    cfg_scale: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="classifier-free guidance: logits = uncond + (cond - uncond) * cfg_scale; "
        "1 is no guidance, 0 ignores the class",
    )
    cfg_schedule: Schedule = Field(
        "constant", description="how guidance grows from 1 to cfg_scale along the codes"
    )
    cfg_power: float = Field(
        2.75, gt=0, le=100, description="exponent of power-cosine; larger guides later"
    )
    cfg_start: Rate = Field(
        0.0, description="fraction of the codes drawn without guidance before it starts"
    )
    temperature: float = Field(1.0, ge=0, le=1000, description="divides the logits; 0 is greedy")
    top_k: int = Field(0, ge=0, le=2**20, description="keep the k likeliest codes; 0 keeps all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep the smallest set of codes whose probability reaches p"
    )

    @field_validator("temperature")
    @classmethod
    def _check_divisor(cls, value: float) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"expected 0 (greedy) or at least 0.0001 (got {value})")
        return value


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments that replace a model's own sampling settings; None keeps the model's."""

    cfg_scale: float | None
    cfg_schedule: Schedule | None
    cfg_power: float | None
    cfg_start: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
