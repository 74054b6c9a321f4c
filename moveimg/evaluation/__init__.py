"""Images -> features -> statistics -> metrics. Only `run` and `sample` use a Pipeline."""
