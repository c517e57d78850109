"""The mathematics of block diffusion on plain tensors: one process, any device."""
