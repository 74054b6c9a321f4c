"""Labels of the class names that users type, and search in class names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from unicodedata import normalize

from moveimg.errors import shorten


def find_label(class_names: Sequence[str], name_or_index: str | int) -> int:
    """Return the label of a class by index, name, synonym or unambiguous part of a name.

    Names are compared in Unicode's form NFC, synonyms and parts also without regard to case. Digits
    are an index unless they name a class. Raises ValueError for an unknown class, an index out of
    range, or text that fits several classes.
    """
    last = len(class_names) - 1
    if not isinstance(name_or_index, str):
        if not 0 <= name_or_index <= last:
            raise ValueError(f"class {shorten(name_or_index)}: expected 0..{last}")
        return int(name_or_index)
    text = normalize("NFC", name_or_index.strip())
    names = [normalize("NFC", name) for name in class_names]
    if names.count(text) == 1:
        return names.index(text)
    if text.isascii() and text.removeprefix("-").isdecimal():
        numbers = [int(name) for name in names if name.isdecimal()]
        if len(numbers) == len(names) or int(text) in numbers:
            example = next(filter(str.isdecimal, names))
            raise ValueError(f"class {shorten(text)} is ambiguous: expected a name like {example}")
        return find_label(class_names, int(text))
    wanted, matches = text.casefold(), search_names(names, text)
    synonyms = [[part.strip() for part in name.casefold().split(",")] for name in names]
    matches = [label for label in matches if wanted in synonyms[label]] or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        some = ", ".join(f"{label} ({names[label]})" for label in matches[:5])
        raise ValueError(f"class {shorten(text)} fits {len(matches)} classes, expected one: {some}")
    known = {synonym: label for label, group in enumerate(synonyms) for synonym in group}
    near = [f"{known[name]} ({name})" for name in get_close_matches(wanted[:200], known)]
    expected = f"expected 0..{last} or a name such as {' or '.join(near) or ', '.join(names[:5])}"
    raise ValueError(f"unknown class {shorten(text)}: {expected}")


def search_names(class_names: Sequence[str], part: str) -> list[int]:
    """Return the indices of the names that contain `part`, without regard to case."""
    folded = [normalize("NFC", name).casefold() for name in (part, *class_names)]
    return [label for label, name in enumerate(folded[1:]) if folded[0] in name]
