"""The ledger mirrored to wandb and other trackers, uploaded again, and shown there as a hosted report."""
