"""Classes by name: the label of what a user types, and search."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

from moveimg.errors import shorten


def find_label(class_names: Sequence[str], name_or_index: str | int) -> int:
    """The label of a class: its index, its name, one of its synonyms, or an unambiguous part.

    Names compare in Unicode's form NFC; synonyms and parts also without regard to case. Digits are
    an index unless they name a class. Raises ValueError for an unknown class, an index out of
    range, or text that fits several classes.
    """
    if not isinstance(name_or_index, str):
        return _check_index(int(name_or_index), class_names)
    text = unicodedata.normalize("NFC", name_or_index.strip())
    names = [unicodedata.normalize("NFC", name) for name in class_names]
    if names.count(text) == 1:
        return names.index(text)
    if text.removeprefix("-").isdecimal() and text.isascii():
        numbers = [name for name in names if name.isdecimal()]
        if len(numbers) == len(names) or any(int(name) == int(text) for name in numbers):
            raise ValueError(
                f"class {shorten(text)} is ambiguous: no class has this name, but names are "
                f"numbers ({', '.join(numbers[:3])}, ...): expected one of them"
            )
        return _check_index(int(text), class_names)
    wanted = text.casefold()
    matches = search_names(names, wanted)
    exact = [label for label in matches if wanted in list_synonyms(names[label])]
    if len(matches := exact or matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(f"{label} ({shorten(names[label])})" for label in matches[:5])
        raise ValueError(f"class {shorten(text)} fits {len(matches)} classes: {some}; be exact")
    known = {synonym: label for label, name in enumerate(names) for synonym in list_synonyms(name)}
    near = [f"{known[name]} ({name})" for name in get_close_matches(wanted[:200], known)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"such as {', '.join(names[:5])}"
    raise ValueError(
        f"unknown class {shorten(text)}: expected an index (0..{len(names) - 1}) or a name; {hint}"
    )


def search_names(class_names: Sequence[str], part: str) -> list[int]:
    """Indices of the names that contain `part`, without regard to case."""
    wanted = unicodedata.normalize("NFC", part).casefold()
    return [
        label
        for label, name in enumerate(class_names)
        if wanted in unicodedata.normalize("NFC", name).casefold()
    ]


def list_synonyms(class_name: str) -> list[str]:
    """`Goldfish, Carassius auratus` -> its names, case-folded."""
    return [part.strip() for part in class_name.casefold().split(",")]


def _check_index(index: int, class_names: Sequence[str]) -> int:
    if not 0 <= index < len(class_names):
        raise ValueError(f"class {shorten(index)}: expected 0..{len(class_names) - 1}")
    return index
