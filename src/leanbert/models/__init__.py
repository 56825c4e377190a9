"""Plain-torch models."""
