"""Weights in other formats: import, export, quantization."""
