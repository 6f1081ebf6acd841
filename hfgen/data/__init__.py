"""Data: from `--dataset` to batches of training images.

Data passes through `opening` (encoded images), `decode` (RGB at the training size), `store` (decoded once, with the
`intake` report), `batches` (seeded order) and `augment` (normalise, augment). Streams: `hub_datasets`, `streaming`.
"""
