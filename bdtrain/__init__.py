"""bdtrain: pretraining of block diffusion language models on Megatron layers, DeepSpeed ZeRO and streamed text."""

__version__ = "0.1.0"
