"""The `moveimg` command: its parts stand in moveimg/commands/."""

from __future__ import annotations

# isort: off
# Importing a module registers its commands; the help lists them in this order.
from moveimg.commands import sampling  # noqa: F401
from moveimg.commands import training  # noqa: F401
from moveimg.commands import images  # noqa: F401
from moveimg.commands import evaluation  # noqa: F401
from moveimg.commands import info  # noqa: F401
from moveimg.commands import inspection  # noqa: F401
from moveimg.commands import convert  # noqa: F401
from moveimg.commands import bench  # noqa: F401

# isort: on
from moveimg.commands.common import app


def main() -> None:
    """Entry point of the console script."""
    app()
