"""The rewrite rules of ``canonicalize``: each a function that raises what it finds in one graph."""
