"""Pure functions of a training step and its memory."""
