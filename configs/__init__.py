"""The settings that are shipped, as YAML groups. A package only so that an installation carries them."""
