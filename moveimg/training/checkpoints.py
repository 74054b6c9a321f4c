"""Checkpoints of a run, such as training/checkpoints/step-0000500/, which appear atomically.

.metadata and *.distcp hold weights, EMA and optimizer (torch.distributed.checkpoint, for any number
of processes), extra.pt the task's other state, checkpoint.json the step and held-out scalars.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from moveimg.dist import World
from moveimg.errors import describe, validate
from moveimg.files import read_json, write_json

INDEX, EXTRA = "checkpoint.json", "extra.pt"
# The names in torch's .metadata; none of them runs code of the file.
ALLOWED_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool",
    },
    "pathlib": {"PosixPath", "WindowsPath"},  # builds a path, and touches no file
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
# torch warns of a single process, which is intended here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class CheckpointInfo(BaseModel):
    """The state of a run at a checkpoint."""

    step: int = Field(ge=0, le=10**12)
    seconds: float = 0.0
    held_out: dict[str, float] = {}
    best: float | None = None  # smallest first value of held_out in the run


class IndexFile(BaseModel):
    """The content of checkpoint.json."""

    checkpoint: CheckpointInfo


class Checkpoints:
    """Writes and reads a run's checkpoints; every process calls its methods in the same order."""

    def __init__(self, directory: Path, keep: int, world: World) -> None:
        self.directory, self.keep, self.world = directory, keep, world
        group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self.options = {"process_group": group, "no_dist": group is None}
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = {path.name[5:]: path for path in self.directory.glob("step-*")}
        return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]

    def save(
        self, step: int, state: dict[str, Any], extra: dict[str, Any], about: dict[str, Any]
    ) -> None:
        """Copy `state` (of torch's get_*_state_dict), and write a checkpoint in the background.

        `extra` is plain data and tensors, the same in all processes; `about` has fields of
        CheckpointInfo. Raises OSError if this or the previous checkpoint cannot be written.
        """
        self.wait()
        final = self.directory / f"step-{step:07d}"
        temporary = self.directory / f".{final.name}.partial"

        def begin() -> None:
            temporary.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()  # torch.save to a file would hide that the disk is full
            torch.save(extra, buffer)
            (temporary / EXTRA).write_bytes(buffer.getbuffer())

        self.world.run_on_rank0(begin)
        written: Any = dcp.async_save(state, checkpoint_id=temporary, **self.options)
        index = {"checkpoint": {"step": step, **about}}
        self.pending = self.writer.submit(self._seal, written, temporary, final, index)

    def wait(self) -> None:
        """Wait until the pending checkpoint, if any, is written. Raises OSError if this fails."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _seal(self, written: Future, temporary: Path, final: Path, index: dict) -> None:
        """Add the index to the written data, rename the folder, remove old checkpoints."""
        try:
            written.result()
        except dcp.CheckpointException as error:
            raise OSError(f"{final}: not written ({reason(error)})") from None
        if not self.world.main:
            return
        write_json(temporary / INDEX, index)
        for path in temporary.iterdir():  # so that a power failure leaves no renamed, empty files
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None. Removes partial checkpoints of a killed run."""
        if self.world.main:
            for path in self.directory.glob(".step-*.partial"):
                shutil.rmtree(path, ignore_errors=True)
        self.world.wait()
        return next(reversed(self.complete()), None)

    def load(self, path: Path, state: dict[str, Any]) -> tuple[dict[str, Any], CheckpointInfo]:
        """Fill `state` from a checkpoint; return (extra, CheckpointInfo). ValueError if damaged."""
        reader, planner = RestrictedReader(path), RestrictedPlanner()
        try:
            dcp.load(state, storage_reader=reader, planner=planner, **self.options)
            # Optimizers keep their step counts on the CPU; the task moves its tensors itself.
            extra = torch.load(path / EXTRA, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{path}: expected only tensors and plain data") from None
        except (dcp.CheckpointException, Exception) as error:  # the first is a BaseException
            raise ValueError(
                f"{path}: damaged, or of another model ({reason(error)}); delete it to continue "
                "from the one before it, or start over with --restart"
            ) from None
        return extra, validate(IndexFile, read_json(path / INDEX), str(path / INDEX)).checkpoint


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's .metadata by an allow-list; torch's reader would run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not allowed")


class RestrictedReader(dcp.FileSystemReader):
    """Reads a distributed checkpoint without running code of its .metadata."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = RestrictedUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RestrictedPlanner(dcp.DefaultLoadPlanner):
    """Reads the non-tensor values of a checkpoint with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


def reason(error: BaseException) -> str:
    """The cause of an error on one line; of a CheckpointException, that of its first process."""
    if isinstance(error, dcp.CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    if isinstance(error.__context__, OSError):  # hidden by torch.save's writer of archives
        return reason(error.__context__)
    return describe(error, 200)
