"""Shared by all training runs: settings, folder, log, checkpoints, stopping."""
