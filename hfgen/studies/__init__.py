"""Studies: a grid of trainings under one budget, run on one machine or many, reported in one table."""
