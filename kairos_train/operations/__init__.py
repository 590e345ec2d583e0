"""What keeps a run going and tells how it goes: events, signals, watching, guards, health, status."""
