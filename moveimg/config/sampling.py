"""The sampling settings, declared once: the command line, the Python API, the HTTP API and the page
take names, ranges, defaults and help texts from the fields of SamplingSettings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from moveimg.config.model import Config, Rate

Schedule = Literal["constant", "linear", "power-cosine"]


class SamplingSettings(Config):
    """How codes are drawn from logits; a model's own defaults are in its `sampling.json`."""

    cfg_scale: float = Field(1.0, ge=0, le=1000, description="classifier-free guidance; 1 is none")
    cfg_schedule: Schedule = Field("constant", description="how guidance grows along the codes")
    cfg_power: float = Field(2.75, gt=0, le=100, description="exponent of power-cosine")
    cfg_start: Rate = Field(0.0, description="share of the codes drawn before guidance starts")
    temperature: float = Field(1.0, ge=0, le=1000, description="divides the logits; 0 is greedy")
    top_k: int = Field(0, ge=0, le=2**20, description="keep the k likeliest codes; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest codes of probability p")

    @field_validator("temperature")
    @classmethod
    def _check_divisor(cls, value: float) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"expected 0 (greedy) or at least 0.0001 (got {value})")
        return value
