"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches, in
a file for each library.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries. What holds from one version to another is tested with the oldest set of
`constraints-oldest.txt` and the newest one of `constraints.txt`.
"""
