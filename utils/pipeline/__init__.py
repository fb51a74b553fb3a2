"""How does a run go? Workspace, stages, store and command line."""
