"""The names of the files of a run: who writes each of them, and who reads it."""

# In the folder of a run, written by training/folder.py and training/log.py.
SETTINGS_FILE = "training_config.json"  # all settings: to resume, as a preset; also beside a published pipeline
STATUS_FILE = "status.json"  # whether it is running, and why it ended: for its page, studies and publishing
LAUNCHES_FILE = "launches.jsonl"  # step, changes and environment of each launch: for the same
EVENTS_FILE = "events.jsonl"  # warnings and rollbacks: for the same
METRICS_FILE = "metrics.jsonl"  # losses and speed: for curves and its page; also published
ABANDONED_FILE = "abandoned-metrics.jsonl"  # entries of steps that it went back from: for whoever wants them
# Written by data/loading.py.
INTAKE_FILE = "intake.json"  # what its images are like: for its page and its model card
# Written by evaluation/during_training.py.
EVALUATIONS_FILE = "evaluations.jsonl"  # all scores: for its page; also published
SCORES_FILE = "scores.json"  # the scores of one pipeline: that in best/, or a published one
# Written by publishing/records.py, beside a published pipeline.
TRAINING_FILE = "training.json"  # how its run went, and its launches: for its model card, and for `hfgen evaluate`
# Written by publishing/folder.py, if asked for. Not called model.safetensors, which diffusers would always download.
DISCRIMINATOR_FILE = "discriminator/discriminator.safetensors"  # its weights: for `--init_from`
