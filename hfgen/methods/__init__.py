"""Method-specific code besides networks and losses: EMA, noise schedules, augmentation, watches."""
