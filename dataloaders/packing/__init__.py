"""Datasets become shards."""
