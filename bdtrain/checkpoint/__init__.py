"""Folders on disk that are either complete and verified or not there: weights and training checkpoints."""
