"""The library that the notebooks share; CONTRIBUTING.md has the map of it."""
