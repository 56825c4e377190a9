"""Computations that a device may have a faster way for."""
