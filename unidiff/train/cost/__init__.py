"""What a run costs, before and while it runs."""
