"""How runs get onto a cluster: the environment of a job, its script, its submission."""
