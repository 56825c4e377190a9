"""From stored tokens to batches."""
