"""Tokenizers, read from folders or trained."""
