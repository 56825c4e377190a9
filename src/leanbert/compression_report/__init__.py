"""Variants of a trained model, what each has saved and what it has cost."""
