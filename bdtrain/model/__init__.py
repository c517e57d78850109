"""The two-stream transformer on megatron-core layers; process groups come in as an argument."""
