"""Which parts of a source may differ from a base image set.

Invariant: a map may name too much, never too little; what cannot be known is
`Unknown`, which means reading everything, never "nothing changed".
"""
