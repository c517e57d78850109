"""Text to shards to batches. This file imports nothing, so that preprocessing workers start without torch."""
