"""What a step reports: time, norms, communication, stragglers."""
