"""Bytes under names: where a repository's objects lie."""
