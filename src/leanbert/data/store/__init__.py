"""Caches on disk: written once, checked, shared."""
