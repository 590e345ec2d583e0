"""What a run logged, read back: status, report, curves, diagnosis."""
