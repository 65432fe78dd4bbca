"""Which blocks of a filesystem are in use, by its own allocation maps.

Invariant: a map may name too much, never too little; whatever is doubtful is
`Unknown`, which means imaging every block, never "nothing is used".
"""
