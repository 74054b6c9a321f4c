"""Images -> features -> statistics -> metrics. Only `run` uses a Pipeline."""
