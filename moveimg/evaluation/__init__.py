"""Images -> features -> statistics -> metrics. Only `run` and `sample` see a model of ours."""
