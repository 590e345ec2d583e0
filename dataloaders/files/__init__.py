"""Bytes from files and URLs; videos."""
