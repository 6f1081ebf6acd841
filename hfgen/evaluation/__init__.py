"""Scoring pipelines against real images."""
