"""What a trained model is worth: open-loop errors beside baselines, rollouts beside the recording."""
