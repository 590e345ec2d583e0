"""Hang detection: heartbeats, faults, stacks."""
