"""What only maintainers run; each file's docstring has its command."""
