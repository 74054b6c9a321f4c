"""The commands of `moveimg`, a file for each panel of its help; importing a file registers them.

Each command checks its arguments, makes one call and prints the result. torch is imported inside
the commands, so that help and refusals come at once.
"""

from moveimg.commands import bench, convert, demo, edit, evaluation, serve, train, use  # noqa: F401
from moveimg.commands.common import app

__all__ = ["app"]
