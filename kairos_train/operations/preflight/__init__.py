"""What is checked before a run takes its devices."""
