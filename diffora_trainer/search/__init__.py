"""The search itself, without a Trainer."""
