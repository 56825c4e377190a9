"""Optimizers with little state."""
