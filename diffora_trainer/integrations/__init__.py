"""Tools around the trainers: one file each, and a callback for those that take nothing else."""
