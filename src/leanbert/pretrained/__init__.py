"""Models from disk, and new ones."""
