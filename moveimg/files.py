"""Atomic writes, bounded readers of JSON and YAML, and locks of output files."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # Windows: outputs are not locked there
    fcntl = None  # type: ignore[assignment]

MAX_TEXT = 32 * 2**20  # bytes
MAX_DEPTH, MAX_NODES = 64, 1_000_000  # nesting levels, values per level (aliases expanded)
_HELD: set[Path] = set()  # paths that this process has locked


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` on success and removed on failure."""
    path = Path(path)
    require_file_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the error of a full disk names no file
        raise


def require_file_name(path: Path) -> None:
    """Raise ValueError if `path` is a directory or device, which no file may replace."""
    if path.exists() and not path.is_file():  # the rename would replace /dev/null itself
        raise ValueError(f"{path} is a directory or device, expected a file name to write to")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Like atomic, for a new directory. FileExistsError if it exists, ValueError if locked."""
    path = Path(path).absolute()
    with lock(path, "creating it"):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{path} exists: expected the name of a new directory")
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(directory: str | Path, name: str = "") -> None:
    """Remove temporary files of killed processes from a directory (with `name`: for that file)."""
    for path in Path(directory).glob(f".{glob.escape(name) or '*'}.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def require_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if the file exists; ValueError for a Git LFS pointer or an HTML page."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith((b"version https://git-lfs", b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a Git LFS pointer (`git lfs pull` helps) or an HTML page")
    return path


def fetch(url: str, path: Path, hash_prefix: str | None = None) -> Path:
    """Return `path`, downloaded from `url` if missing; `hash_prefix` begins the file's sha256."""
    if not path.is_file():
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)
        except (OSError, RuntimeError) as error:
            why = f"is missing and cannot be downloaded ({error}): download {url} to {path}"
            raise FileNotFoundError(f"{path.name} {why}") from None
    return path


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file. Raises FileNotFoundError, or ValueError above `limit` bytes."""
    path = require_file(path)
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {size} bytes, expected at most {limit}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises FileNotFoundError, or ValueError with a one-line message."""
    return parse_json(read_text(path), str(path))


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file. Raises FileNotFoundError, or ValueError with a one-line message."""
    return parse_yaml(read_text(path, 2**20), str(path))


def _parse(load: Callable[[Any], Any], kind: str, text: str | bytes, origin: str) -> Any:
    """Parse a text by `load`. Raises ValueError, one line that begins with `origin`."""
    try:
        data = load(text)
    except Exception as error:  # PyYAML's constructors raise many kinds: `!!int ""`, `!!bool maybe`
        problem = " ".join(str(error)[:400].split())
        raise ValueError(f"{origin}: not valid {kind} ({problem})") from None
    level, nested = [data], dict | list | tuple | set
    for _ in range(MAX_DEPTH):
        groups = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, nested))
        level = list(islice(chain.from_iterable(groups), MAX_NODES + 1))
        if not level:
            return data
        if len(level) > MAX_NODES:
            break
    raise ValueError(f"{origin}: more than {MAX_DEPTH} levels or {MAX_NODES} values at one level")


parse_json = partial(_parse, json.loads, "JSON")  # arguments: text, origin


class UniqueKeyLoader(yaml.SafeLoader):
    """A yaml.SafeLoader that refuses equal keys, of which SafeLoader would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"the key {repeated[0][:60]!r} occurs twice")
        return node


parse_yaml = partial(_parse, partial(yaml.load, Loader=UniqueKeyLoader), "YAML")


@contextmanager
def lock(path: str | Path, job: str) -> Iterator[None]:
    """Hold the lock of an output file or directory, a hidden file next to it, inside the block.

    Only rank 0 locks, and a process may lock a path twice. Removes the temporary files of killed
    processes. Raises ValueError, which names the process that holds the lock, and its `job`.
    """
    path = Path(path).absolute()
    if fcntl is None or os.environ.get("RANK", "0") != "0" or path in _HELD:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.lock"
    if path.is_dir() and not os.access(path.parent, os.W_OK):  # as for a mounted volume
        name = path / ".lock"
    while True:
        file = open(name, "a+", encoding="utf-8")  # noqa: SIM115 (closed in `finally`)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # the holder may not have written its name yet
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise ValueError(f"{path} is in use by {holder}: wait for it, or stop it") from None
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(name).st_ino:
                break
        file.close()  # its last holder has meanwhile removed it
    _HELD.add(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} ({job})")
        file.flush()
        remove_temporaries(path.parent, path.name)
        if path.is_dir():
            remove_temporaries(path)
        yield
    finally:
        _HELD.discard(path)
        name.unlink(missing_ok=True)
        file.close()
