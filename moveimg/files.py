"""Files that appear whole or not at all, bounded readers of JSON and YAML, and locks."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # Windows: directories are not locked there
    fcntl = None  # type: ignore[assignment]

MAX_TEXT = 32 * 2**20  # bytes of a JSON or YAML file; a manifest of ImageNet takes less
MAX_DEPTH = 64  # nested lists and mappings
MAX_NODES = 1_000_000  # values of a YAML text with its aliases written out
# .NAME.SUFFIX.abcd1234.SUFFIX, as `atomic` names them
TEMPORARY = re.compile(r"\..+(\.\w+)\.[a-z0-9_]{8}\1")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it on success, removed on failure.

    Makes missing parent folders. Raises OSError, naming the path, where it cannot be written.
    """
    path = Path(path)
    require_file_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are readable by their owner alone
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a full disk does not say which file it was
        raise


def require_file_name(path: Path) -> None:
    """Raise IsADirectoryError for a folder, ValueError for a device or pipe, to be written to."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected a file name to write to")
    if path.exists() and not path.is_file():  # the rename would replace /dev/null itself
        raise ValueError(f"{path} is no regular file, expected a file name to write to")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; renamed to it on success, removed on failure.

    Makes missing parent folders, and removes what a killed process has left of the same name.
    Raises FileExistsError where something is there already (an empty folder is replaced),
    ValueError where another process is making it.
    """
    path = Path(path).absolute()
    with lock(path, "creating it"):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{path} is there already: expected a name for a new directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = f".{path.name}.", ".tmp"
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=suffix))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are open to their owner alone
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_temporaries(directory: str | Path, name: str = "") -> None:
    """Remove the temporary files of `atomic` that a killed process has left in a folder.

    With `name`, those of this file alone.
    """
    for path in Path(directory).glob(f".{glob.escape(name)}.*" if name else ".*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def require_file(path: str | os.PathLike[str]) -> Path:
    """The path of an existing file; ValueError for a Git LFS pointer or an HTML page."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: fetch it by `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is an HTML page, not the file: download the file itself")
    return path


def fetch(url: str, path: Path, hash_prefix: str | None = None) -> Path:
    """`path`, downloaded from `url` where it is missing. Raises FileNotFoundError without network.

    hash_prefix: the start of the file's sha256.
    """
    if not path.is_file():
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{path.name} is missing and cannot be downloaded ({error}): bring {url} to {path}"
            ) from None
    return path


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """The text of a UTF-8 file.

    Raises FileNotFoundError where there is none, ValueError where it is no text or larger than
    `limit` bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path}: {size} bytes, expected at most {limit}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def read_json(path: str | Path) -> Any:
    """The data of a JSON file; FileNotFoundError or a one-line ValueError where it has none."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, origin: str) -> Any:
    """The data of a JSON text; ValueError, one line with `origin`, where it is not valid."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"{origin}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{origin}: not valid JSON ({str(error)[:200]})") from None
    _check_depth(data, origin)
    return data


def read_yaml(path: str | Path) -> Any:
    """The data of a YAML file; FileNotFoundError or a one-line ValueError where it has none."""
    return parse_yaml(read_text(path, 2**20), str(path))


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's loader of plain data, which by itself lets the last of equal keys win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value[:60]!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def parse_yaml(text: str, origin: str) -> Any:
    """The data of a YAML text; ValueError, one line with `origin`, where it is not valid."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error)[:400].split())
        raise ValueError(f"{origin}: not valid YAML ({problem})") from None
    except RecursionError:
        raise ValueError(f"{origin}: nested too deeply") from None
    except Exception as error:  # PyYAML's constructors raise many kinds: `!!int ""`, `!!bool maybe`
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{origin}: not valid YAML ({problem})") from None
    _check_depth(data, origin)
    return data


def _check_depth(data: Any, origin: str) -> None:
    """Raise ValueError for data nested too deeply, or of too many values (aliases count anew)."""
    level, count = [data], 0
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                children += value.values()
            elif isinstance(value, list | tuple | set):
                children += value
            if len(children) > MAX_NODES:
                raise ValueError(f"{origin}: more than {MAX_NODES} values")
        if not children:
            return
        count += len(children)
        if count > 4 * MAX_NODES:
            break
        level = children
    raise ValueError(f"{origin}: nested too deeply, expected at most {MAX_DEPTH} levels")


_HELD: set[Path] = set()  # locks of this process


@contextmanager
def lock(path: str | Path, job: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output file or directory; it ends with its process.

    The lock is a hidden file beside `path`, or in it where its parent cannot be written. Of several
    ranks only rank 0 locks: they are one job. A process that holds it may enter again. What a
    killed process has left of `atomic` in the directory, or beside the file, is removed. `job`
    says what is being done, for the message of the process that comes second. Raises ValueError,
    naming the process that holds it, or with `wait` waits for it.
    """
    path = Path(path).absolute()
    if fcntl is None or os.environ.get("RANK", "0") != "0" or path in _HELD:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.lock"
    if path.is_dir() and not os.access(path.parent, os.W_OK):  # such as a mounted volume
        name = path / ".lock"
    while True:
        file = open(name, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(0.05)  # it may have it for a moment only, and not have written its name yet
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise ValueError(f"{path} is in use by {holder}: wait for it, or stop it") from None
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(name).st_ino:
                break
        file.close()  # its last holder has removed it meanwhile
    _HELD.add(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} ({job})")
        file.flush()
        remove_temporaries(*((path,) if path.is_dir() else (path.parent, path.name)))
        yield
    finally:
        _HELD.discard(path)
        name.unlink(missing_ok=True)
        file.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
