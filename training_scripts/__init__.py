"""The training scripts, with their presets and the shipped studies.

`accelerate launch training_scripts/train_ddpm.py` starts one in a checkout, and `accelerate launch -m
hfgen.training_scripts.train_ddpm` wherever hfgen is installed.
"""
