"""Print docs/api.md: the public names of moveimg and tokenizer with their docstrings.

    python tools/api_reference.py > docs/api.md

A test compares the file with this output.
"""

import inspect
import re
from typing import Any

import moveimg
import tokenizer

HEADER = """\
# Python API

Made by `python tools/api_reference.py` from the docstrings. Images are PIL images at the edge and
float32 [B, 3, H, W] in [-1, 1] inside; codes are int64 [B, T] in raster order."""
CLASSES = (moveimg.Pipeline, tokenizer.AutoencoderTokenizer)


def api_reference() -> str:
    """Return Markdown with a section for each public function, class and class member."""
    sections = [HEADER]
    for module in (moveimg, tokenizer):
        sections.append(f"## {module.__name__}")
        for name in module.__all__:
            item = getattr(module, name)
            if inspect.isfunction(item) or item in CLASSES:
                sections.append(describe(f"{module.__name__}.{name}", item))
            for key, member in vars(item).items() if item in CLASSES else ():
                if not key.startswith("_") and (member := inspect.unwrap(member)).__doc__:
                    sections.append(describe(f"{name}.{key}", getattr(member, "__func__", member)))
    return "\n\n".join(sections)


def describe(title: str, item: Any) -> str:
    """Return a heading, the signature of `item` and its docstring, with lists as verbatim text."""
    signature = str(inspect.signature(item)) if callable(item) else ""
    signature = re.sub(r"\((self|cls)(, |(?=\)))", "(", signature)
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)
    text = re.sub(r"(?m)^(\w+:\n(?: {4}.*\n)+)", r"```text\n\1```\n", f"{inspect.getdoc(item)}\n")
    text = re.sub(r"(?m)((?:^>>> .*\n)+)", r"```python\n\1```\n", text)
    return f"### {title}\n\n```python\n{title}{signature}\n```\n\n{text.strip()}"


if __name__ == "__main__":
    print(api_reference())
