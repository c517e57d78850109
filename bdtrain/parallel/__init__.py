"""The only home of process groups and engines: Megatron's schedule inside a DeepSpeed engine."""
