"""Generating images with a trained pipeline, and pictures made of them."""
