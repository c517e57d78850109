"""bdtrain: pretraining of block diffusion language models on Megatron layers and DeepSpeed ZeRO."""

__version__ = "0.1.0"
