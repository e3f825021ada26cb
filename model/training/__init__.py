"""The training step and loop, the schedule, the logs."""
