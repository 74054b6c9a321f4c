"""How fast sampling, encoding and training are here, beside what the machine allows.

limits.py     memory bandwidth and matrix rate of the machine, measured in the same run
timing.py     repeats, medians, the device waited for
workloads.py  the three things measured, and the least work each could take
"""
