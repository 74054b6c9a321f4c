"""Images -> features -> statistics -> metrics. Only `run` and `sample` see a model of ours.

Nothing is imported here, so that each module comes without the libraries of the others.
"""
