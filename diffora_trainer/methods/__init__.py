"""By what the modules are chosen."""
