"""What knows nothing but torch: budgets, selections, files."""
