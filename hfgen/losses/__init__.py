"""The objectives, as plain functions of tensors: `diffusion`, `gan`."""
