"""Frozen encoders: video to latents, prompt to context, behind the two protocols of `interfaces`."""
