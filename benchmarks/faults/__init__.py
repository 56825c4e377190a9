"""Experiments that damage, kill and interrupt; see `benchmarks/faults.py`."""
