"""The models on offer: named without their paths, described before loading, loaded when used."""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from moveimg.checkpoint import read_class_names, read_model_config, read_sampling
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.errors import describe
from moveimg.inspect import without_bank
from moveimg.pipeline import Pipeline, resolve

LOG = logging.getLogger("moveimg.demo")


@dataclass(frozen=True)
class ModelInfo:
    """What the page shows of a model before it is loaded; `name` is never a path."""

    name: str
    directory: Path
    config: ModelConfig
    class_names: list[str]
    sampling: SamplingSettings

    @property
    def has_bank(self) -> bool:
        return self.config.memory.kind != "none"


class Models:
    """The models of one demo, at most `keep` of them in memory, least recently used first out.

    Args:
        names_or_paths: as for Pipeline.from_pretrained.
        keep: how many models may be in memory.
        device, dtype: as for Pipeline.from_pretrained.

    Raises ValueError or FileNotFoundError for a model that is missing or damaged.
    """

    def __init__(
        self,
        names_or_paths: list[str],
        keep: int = 1,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.keep, self.device, self.dtype = keep, device, dtype
        self.infos: dict[str, ModelInfo] = {}
        for item in names_or_paths:
            path = resolve(item)
            name = base = Path(item).name or path.resolve().name
            while name in self.infos:
                name = f"{base} ({len(self.infos)})"
            config, names = read_model_config(path), read_class_names(path)
            if len(names) != config.n_classes:
                raise ValueError(
                    f"{path / 'classes.json'}: expected {config.n_classes} class names"
                )
            self.infos[name] = ModelInfo(name, path, config, names, read_sampling(path))
        self._pipelines: OrderedDict[str, dict[bool, Pipeline]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory, least recently used first."""
        return list(self._pipelines)

    def describe(self, name: str | None = None) -> ModelInfo:
        """Return a model by name, or the first one. Raises ValueError for an unknown name."""
        name = name or self.names[0]
        if name not in self.infos:
            raise ValueError(f"model {name[:60]!r}: expected one of {', '.join(self.names)}")
        return self.infos[name]

    def comparable(self, name: str | None = None) -> list[str]:
        """Names of the other models that have the same classes."""
        this = self.describe(name)
        same = (info for info in self.infos.values() if info.class_names == this.class_names)
        return [info.name for info in same if info is not this]

    def get(self, name: str | None = None, bank: bool = True) -> Pipeline:
        """Load a model if it is not in memory; `bank=False` zeroes the slots of its memory."""
        info = self.describe(name)
        with self._lock:
            if info.name not in self._pipelines:
                while len(self._pipelines) >= self.keep:  # first, since both may not fit
                    self._pipelines.popitem(last=False)
                self._pipelines[info.name] = {True: self._load(info)}
            self._pipelines.move_to_end(info.name)
            variants = self._pipelines[info.name]
            if bank not in variants:
                variants[bank] = copy.copy(variants[True])
                variants[bank].generator = without_bank(variants[True].generator)
            return variants[bank]

    def _load(self, info: ModelInfo) -> Pipeline:
        try:
            return Pipeline.from_pretrained(info.directory, device=self.device, dtype=self.dtype)
        except (OSError, ValueError) as error:  # names the server's files: for its log alone
            LOG.error("%s: %s", info.name, describe(error))
            raise ValueError(
                f"model {info.name!r} cannot be loaded; the server's log says why"
            ) from None
