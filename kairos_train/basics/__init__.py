"""The ground: errors, files, formats and geometry that every package may import."""
