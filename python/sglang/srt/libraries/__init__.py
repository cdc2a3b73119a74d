"""Libraries that are found at run time: each loader returns one, or raises ImportError with the reason.

Our own kernel library is found by `layers/attention/nsa/kernels.py`: the portable core ships with it.
"""
