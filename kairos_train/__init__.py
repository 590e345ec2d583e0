"""kairos-train: training of Kairos-type world-action models."""

__version__ = "0.1.0"
