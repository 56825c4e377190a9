"""What a run tells while it goes, and what it leaves."""
