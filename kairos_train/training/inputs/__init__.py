"""Samples become the batches of a step."""
