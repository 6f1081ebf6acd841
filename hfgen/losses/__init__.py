"""Training objectives as plain functions of tensors: `diffusion`, `edm`, `gan`, `learned`, `vae`."""
