"""Training: schedules, patches, losses, the step, checkpoints, the log and the measurements."""
