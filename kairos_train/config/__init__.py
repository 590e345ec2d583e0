"""Typed configuration. `schema` holds plain dataclasses (no dependency); `compose` builds them with hydra."""
