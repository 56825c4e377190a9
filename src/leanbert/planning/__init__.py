"""What a run needs before anything is allocated, and which techniques fit it into a budget."""
