"""The models on offer: named without their paths, described without loading, loaded when used."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moveimg.pipeline import Pipeline

LOG = logging.getLogger("moveimg.demo")
BUNDLED = Path(__file__).parents[2] / "moveimg" / "bundled"


@dataclass(frozen=True)
class About:
    """What the page needs to know of a model before it is loaded.

    Attributes:
        name: what visitors see; never a path.
        class_names: of every label.
        settings: the model's own sampling settings, by name.
        grid: rows and columns of codes.
        codebook_size: codes are in 0..codebook_size-1.
        has_bank: whether it has a value memory.
    """

    name: str
    class_names: list[str]
    settings: dict[str, Any]
    grid: tuple[int, int]
    codebook_size: int
    has_bank: bool


def describe(name: str, directory: Path) -> About:
    """Read a model directory's JSON files; torch is not needed for that.

    Raises ValueError naming the model if one is missing or damaged.
    """
    try:
        files = [
            json.loads((directory / f"{part}.json").read_text(encoding="utf-8"))
            for part in ("config", "classes", "sampling")
        ]
        config, classes, settings = files[0]["model"], files[1], files[2]
        has_bank = config.get("memory", {}).get("kind", "none") != "none"
        grid = (int(config["grid"][0]), int(config["grid"][1]))
        return About(name, list(classes), settings, grid, int(config["codebook_size"]), has_bank)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {name!r} cannot be read ({error!r})") from None


class Models:
    """The models of one demo, at most `keep` of them in memory, least recently used first out.

    Args:
        names_or_paths: as for Pipeline.from_pretrained.
        keep: most models in memory.
        device, dtype: as for Pipeline.from_pretrained.

    Raises ValueError or FileNotFoundError for a model that is not there or is damaged.
    """

    def __init__(
        self,
        names_or_paths: list[str],
        keep: int = 1,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.keep, self.device, self.dtype = keep, device, dtype
        self._where: dict[str, Path] = {}
        self.about: dict[str, About] = {}
        for given in names_or_paths:
            directory = _find(given)
            name = _unused(Path(given).name or directory.name, self._where)
            self._where[name] = directory
            self.about[name] = describe(name, directory)
        self._loaded: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.about)

    def describe(self, name: str | None) -> About:
        """A model by name; the first where none is given. ValueError for one not on offer."""
        if not name:
            return self.about[self.names[0]]
        if name not in self.about:
            raise ValueError(f"model {name!r}: expected one of {', '.join(self.names)}")
        return self.about[name]

    def comparable(self, name: str | None) -> list[str]:
        """The other models that know the same classes."""
        mine = self.describe(name)
        others = (about for about in self.about.values() if about.name != mine.name)
        return [about.name for about in others if about.class_names == mine.class_names]

    def get(self, name: str | None) -> Pipeline:
        """The pipeline of a model, loaded if need be."""
        name = self.describe(name).name
        with self._lock:
            if name not in self._loaded:
                from moveimg.pipeline import Pipeline

                while len(self._loaded) >= self.keep:  # out before in: both may not fit
                    self._loaded.popitem(last=False)
                try:
                    self._loaded[name] = Pipeline.from_pretrained(
                        self._where[name], device=self.device, dtype=self.dtype
                    )
                except (OSError, ValueError) as error:  # names files of the server: for its log
                    LOG.error("%s: %s", name, error)
                    raise ValueError(
                        f"model {name!r} cannot be loaded; the server's log says why"
                    ) from None
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def loaded(self) -> list[str]:
        """Names of the models in memory, least recently used first."""
        return list(self._loaded)


def _find(given: str) -> Path:
    """The directory of a model; names that are not here yet are downloaded, as the library does."""
    for path in (Path(given), BUNDLED / given):
        if (path / "config.json").is_file():
            return path
    from moveimg.pipeline import resolve

    return resolve(given)


def _unused(name: str, taken: dict[str, Path]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free
