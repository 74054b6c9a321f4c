"""Looking inside a trained model: what its gates, its memory and its experts do.

gates.py       gates by layer, head, class and position; what the memory adds
bank.py        which rows are read, how large they are, which gradients reach them
maps.py        where in one picture each layer leans on the bank; a model without its bank
report.py      all of it as plain data, and warnings
plots.py       the same as pictures
"""

from moveimg.inspection.report import inspect_model

__all__ = ["inspect_model"]
