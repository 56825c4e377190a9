"""Thin toggles over the memory techniques."""
