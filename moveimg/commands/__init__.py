"""The commands of `moveimg`; importing a file registers its commands.

torch is imported inside the commands, to keep --help fast.
"""

from moveimg.commands import sample, serve, inspect, train, evaluation, convert  # noqa: F401, I001 (the help's order)
from moveimg.commands.common import app

__all__ = ["app"]
