"""Helpers shared by the tests; import them as `from support.<module> import ...`."""
