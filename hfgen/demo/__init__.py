"""The page on which a pipeline can be tried, here or as a Space."""
