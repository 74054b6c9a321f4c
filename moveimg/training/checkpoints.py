"""Checkpoints of a run: written in the background, complete or not at all, verified when read.

training/checkpoints/step-0000500/
    .metadata, __0_0.distcp, ...   weights, average and optimizer (torch.distributed.checkpoint)
    extra.pt                       other state of the task, such as a discriminator
    checkpoint.json                step, seconds, held-out scalars; every file's size and sha256

A checkpoint is written into a hidden folder and renamed, so a folder of that name is complete.
Any number of processes can read it, with DDP or FSDP2 whichever wrote it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
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

from moveimg.data import sha256_file
from moveimg.dist import World, print_rank0
from moveimg.errors import describe

INDEX, EXTRA = "checkpoint.json", "extra.pt"
NAME = re.compile(r"step-(\d+)")
PARTIAL = ".partial"
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
# Errors of torch's reader for a checkpoint of other tensors, or for a forged one.
UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError)

# torch warns of a single process, which is intended here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class Checkpoints:
    """Writes and reads the checkpoints in a folder; the newest `keep` are kept.

    Every process of a run makes one and calls its methods in the same order. A checkpoint that
    cannot be written gives a warning, and `finish` raises an error if it was the last one.
    """

    def __init__(self, directory: Path, keep: int, world: World) -> None:
        self.directory, self.keep, self.world = directory, keep, world
        self.group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.failure: OSError | None = None

    def steps(self) -> dict[int, Path]:
        """The complete checkpoints by step, oldest first."""
        found = {}
        for path in self.directory.glob("step-*"):
            if match := NAME.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    # --- writing ---------------------------------------------------------------------------

    def save(
        self, step: int, state: dict[str, Any], extra: dict[str, Any], about: dict[str, Any]
    ) -> None:
        """Copy the state of torch's get_*_state_dict, and write it in the background.

        `extra` is small plain data and tensors, the same in all processes; `about` goes into
        checkpoint.json (see Index).
        """
        self.wait()
        self.failure = None
        final = self.directory / f"step-{step:07d}"
        temporary = self.directory / f".{final.name}{PARTIAL}"
        try:
            if self.world.main:
                temporary.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()  # into a file, torch.save would not say that the disk is full
                torch.save(extra, buffer)
                (temporary / EXTRA).write_bytes(buffer.getbuffer())
        except OSError as error:
            self._failed(step, temporary, error)
        if self.world.any(self.failure is not None):
            return
        options = {"process_group": self.group, "no_dist": self.group is None}
        try:
            written: Any = dcp.async_save(state, checkpoint_id=temporary, **options)
        except dcp.CheckpointException as error:
            self._failed(step, temporary, error)
        else:
            self.pending = self.writer.submit(self._seal, written, temporary, final, step, about)

    def wait(self) -> None:
        """Wait until the current checkpoint, if any, is written or has failed."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises OSError if it could not be written."""
        self.wait()
        self.writer.shutdown()
        if self.failure is not None:
            raise self.failure

    def _seal(
        self, written: Future, temporary: Path, final: Path, step: int, about: dict[str, Any]
    ) -> None:
        """Add the index to the written data, rename the folder, remove old checkpoints."""
        try:
            written.result()
            if self.world.main:
                files = {
                    path.name: [path.stat().st_size, sha256_file(path)]
                    for path in sorted(temporary.iterdir())
                }
                with (temporary / INDEX).open("w", encoding="utf-8") as file:
                    file.write(sealed({"step": step, **about, "files": files}))
                    file.flush()
                    os.fsync(file.fileno())
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                for old in list(self.steps().values())[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except (dcp.CheckpointException, OSError) as error:
            self._failed(step, temporary, error)

    def _failed(self, step: int, temporary: Path, error: BaseException) -> None:
        if self.world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failure = OSError(f"checkpoint of step {step} not written ({reason(error)})")
        print_rank0(f"warning: {self.failure}; earlier ones stay")

    # --- reading ---------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove checkpoints that a killed run has left incomplete."""
        if self.world.main:
            for path in self.directory.glob(f".step-*{PARTIAL}"):
                shutil.rmtree(path, ignore_errors=True)
        self.world.wait()

    def newest(self) -> Path | None:
        """The newest intact checkpoint; None if there is no checkpoint.

        Damaged ones are renamed to step-N.damaged, with a warning. Raises ValueError if all are
        damaged.
        """
        intact: list[Path] = []
        self.world.run_first(lambda: intact.extend(self._set_aside_damaged()))
        chosen: Any = self.world.from_main(intact[0] if intact else None)
        return chosen

    def _set_aside_damaged(self) -> list[Path]:
        """The newest intact checkpoint, if any; damaged ones after it are renamed."""
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.steps().values()):
            if (problem := find_damage(path)) is None:
                for bad, what in damaged:
                    aside = bad.with_name(f"{bad.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    bad.rename(aside)
                    print_rank0(f"warning: {bad}: {what}; set aside, going back to {path.name}")
                return [path]
            damaged.append((path, problem))
        for path, problem in damaged:
            raise ValueError(f"{path}: damaged checkpoint ({problem}); start again with --restart")
        return []

    def load(self, path: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fill `state` from an intact checkpoint; return its extra data and its index.

        Raises ValueError for a checkpoint of other tensors, or with more than tensors and plain
        data.
        """
        try:
            dcp.load(
                state,
                storage_reader=RestrictedReader(path),
                planner=RestrictedPlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
            # Optimizers keep their step counts on the CPU; the task moves its tensors itself.
            extra = torch.load(path / EXTRA, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{path}: holds more than tensors and plain data; refused") from None
        except (dcp.CheckpointException, *UNFIT) as error:
            raise ValueError(f"{path}: does not fit this run ({reason(error)})") from None
        return extra, read_index(path)


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's .metadata by an allow-list; torch's reader would run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of an allowed name. Raises UnpicklingError for others."""
        if name in ALLOWED_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not allowed")


class RestrictedReader(dcp.FileSystemReader):
    """Reads a distributed checkpoint without running code of its .metadata."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The checkpoint's metadata, as FileSystemReader.read_metadata returns it."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = RestrictedUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(".metadata holds no metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RestrictedPlanner(dcp.DefaultLoadPlanner):
    """Reads the values of a checkpoint that are no tensors (rates, counts) by weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value read from the checkpoint into the state."""
        loaded = torch.load(value, weights_only=True)
        fqn = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.state_dict[fqn] = loaded


class Index(BaseModel):
    """The contents of checkpoint.json."""

    step: int = Field(ge=0, le=10**12)
    seconds: float = 0.0
    held_out: dict[str, float] = {}
    validated: int | None = None  # the step of held_out
    best: float | None = None  # the least first value of held_out so far
    files: dict[str, tuple[int, str]] = Field(min_length=1)  # name -> bytes, sha256


def find_damage(path: Path) -> str | None:
    """The first difference of a checkpoint's files from those written; None if there is none."""
    index = read_index(path)
    if not index or path.name != f"step-{index['step']:07d}":
        return f"{INDEX} cannot be read"
    for name, (size, digest) in index["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if sha256_file(file) != digest:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def sealed(index: dict[str, Any]) -> str:
    """The text of checkpoint.json, with a digest of its own."""
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    return json.dumps({"checkpoint": index, "sha256": digest}, indent=1) + "\n"


def read_index(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's checkpoint.json; empty if it is damaged or ill-typed."""
    try:
        text = (path / INDEX).read_text(encoding="utf-8")
        index = json.loads(text)["checkpoint"]
        return Index.model_validate(index).model_dump() if sealed(index) == text else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def reason(error: BaseException) -> str:
    """The cause of an error on one line; of a CheckpointException, that of its first process."""
    if isinstance(error, dcp.CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error.__context__, OSError):  # hidden by torch.save's writer of archives
        return reason(error.__context__)
    return describe(error, 200)
