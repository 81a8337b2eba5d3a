"""Shortcuts: low-rank residual and cross-layer connections, after HeteroLoRA."""
