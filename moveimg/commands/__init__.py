"""The commands of `moveimg`, a file for each kind of job.

Thin: options in, one call, one line or picture out. Heavy imports stand inside the commands, so
that `moveimg --help` answers at once.
"""
