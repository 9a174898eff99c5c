"""What was learned and what it cost."""
