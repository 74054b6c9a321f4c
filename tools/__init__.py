"""Scripts for maintainers; the docstring of each script shows its command."""
