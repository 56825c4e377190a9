"""Texts to begin with, where no files are given."""
