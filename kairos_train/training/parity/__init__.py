"""A layout held to one process."""
