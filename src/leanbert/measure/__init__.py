"""What memory a run takes, and where."""
