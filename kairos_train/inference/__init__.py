"""From an export folder to actions and video: needs torch, numpy and safetensors, no trainer and no process group."""
