"""Training schedules of the two factors of a LoRA, as callbacks for any Trainer and calls for a loop of one's own."""
