"""The library that the notebooks share: one room a file, each importing only from floors below it (README, "Structure")."""
