"""Data: from `--dataset` to batches of training images.

The walk: `sources` (encoded images) -> `decode` (RGB of the training size) -> `store` (decoded once, with the
`intake` report) -> `batches` (a seeded order) -> `augment` (normalised, augmented). Streams go `hub` -> `streaming`.
"""
