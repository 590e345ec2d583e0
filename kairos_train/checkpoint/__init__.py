"""The one checkpoint format: full-shape tensors by name, in safetensors files that a manifest describes."""
