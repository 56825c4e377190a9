"""What the training loop does besides steps."""
