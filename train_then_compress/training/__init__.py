"""The one training loop, its clock, schedules and checkpoints. It knows nothing of the task it trains on."""
