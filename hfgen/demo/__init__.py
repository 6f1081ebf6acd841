"""A web page for trying pipelines, locally or as a Space."""
