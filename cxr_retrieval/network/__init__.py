"""Backbones, progressive steps, attention crop, the whole network: tensors in, tensors out."""
