"""What a model is worth: likelihood on held-out text, baselines on the same text, samples."""
