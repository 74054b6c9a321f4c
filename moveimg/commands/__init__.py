"""The commands of `moveimg`, each imported when it is used.

torch and pydantic are imported inside the commands, to keep --help fast.
"""

from moveimg.commands.common import app

__all__ = ["app"]
