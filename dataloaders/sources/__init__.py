"""Where samples come from before they are packed: LeRobot datasets, videos with a manifest, WebDataset shards; URLs."""
