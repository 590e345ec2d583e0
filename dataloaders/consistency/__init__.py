"""Checks of the sources within one dataset against each other: pure functions over plain tables."""
