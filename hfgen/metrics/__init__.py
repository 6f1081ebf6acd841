"""Scores of generated images against real ones: plain functions of features, and feature extractors."""
