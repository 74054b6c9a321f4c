"""Settings of sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from moveimg.config.model import Config, Rate

Schedule = Literal["constant", "linear", "power-cosine"]


class SamplingSettings(Config):
    """Settings for drawing codes from logits; a model's defaults are in its `sampling.json`."""

    # The command line, the APIs and the page take names, ranges and help texts from these fields.

    cfg_scale: float = Field(1.0, ge=0, le=1000, description="classifier-free guidance; 1: none")
    cfg_schedule: Schedule = Field("constant", description="growth of guidance over the codes")
    cfg_power: float = Field(2.75, gt=0, le=100, description="exponent of power-cosine")
    cfg_start: Rate = Field(0.0, description="share of the codes drawn before guidance starts")
    temperature: float = Field(1.0, ge=0, le=1000, description="divides the logits; 0: greedy")
    top_k: int = Field(0, ge=0, le=2**20, description="draw from the k likeliest codes; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from likeliest codes of total mass p")

    @field_validator("temperature")
    @classmethod
    def _check_divisor(cls, value: float) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"expected 0 (greedy) or at least 0.0001 (got {value})")
        return value
