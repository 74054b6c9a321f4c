"""Evaluation: images -> features -> statistics -> metrics. Only `run` uses a Pipeline."""
