"""The numbers of `moveimg evaluate` inside training."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moveimg.config import EvaluationConfig
from moveimg.dist import World
from moveimg.pipeline import Pipeline
from moveimg.training.generator import train_generator
from moveimg.training.scoring import Scorer
from tests.test_training import CPU, train_config

SMALL = {"every": 2, "images": 9, "reference": "digits"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))


def test_scores_reach_tensorboard_and_change_nothing_else(digits, tmp_path):
    common = {"steps": 3, "validate_every": 3, "preview_every": 3, "checkpoint_every": 3}
    config = train_config(digits, tmp_path / "scored", evaluation=SMALL, **common)
    scored = train_generator(config, CPU)
    plain = train_generator(train_config(digits, tmp_path / "plain", **common), CPU)
    assert scored["loss"] == plain["loss"]  # the samples take no random numbers of the training
    events = EventAccumulator(str(tmp_path / "scored" / "training")).Reload()
    found = {tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")}
    assert found >= {"eval/fid", "eval/precision", "eval/recall", "eval/kid", "eval/accuracy"}
    assert [event.step for event in events.Scalars("eval/fid")] == [2, 3]


@dataclass(frozen=True)
class Half(World):
    """One of two processes, after each other: the sum has what both gave."""

    given: list[torch.Tensor] = field(default_factory=list)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        if not self.main:
            self.given.append(values)
            return values
        return (values + self.given.pop(0)) / 2


def test_processes_share_the_images_and_the_first_has_the_numbers():
    pipeline = Pipeline.from_pretrained("digits", device="cpu", dtype="float64")
    config = EvaluationConfig.model_validate(SMALL)
    given: list[torch.Tensor] = []
    found = []
    for world in (World(), Half(1, 2, given=given), Half(0, 2, given=given)):
        scorer = Scorer(config, pipeline.sampling, pipeline.tokenizer, (8, 8), world)
        found.append(scorer(pipeline.generator))
    alone, other, shared = found
    assert other == {} and shared == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert alone["fid"] > 0 and 0 <= alone["accuracy"] <= 1


def test_a_reference_that_does_not_fit_ends_the_run_before_it_begins(digits, tmp_path):
    wrong = {"every": 2, "reference": str(tmp_path / "nowhere.npz"), "images": 4}
    wrong["extractor"] = tmp_path / "none.safetensors"
    config = train_config(digits, tmp_path / "run", evaluation=wrong)
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz"):
        train_generator(config, CPU)
    assert not (tmp_path / "run").exists()
