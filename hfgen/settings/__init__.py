"""The settings of each method, in files that import neither torch nor diffusers: `--help` and errors come at once."""
