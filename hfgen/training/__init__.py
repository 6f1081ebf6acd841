"""What every training run shares: settings, folder, log, checkpoints, and how it ends."""
