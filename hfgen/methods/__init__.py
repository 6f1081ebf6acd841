"""What one or two methods need beside networks and losses: averages, schedules, augmentation, watches."""
