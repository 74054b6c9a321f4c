"""Public weights and other models as model directories: converted, downloaded, shared."""
