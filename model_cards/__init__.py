"""The cards of what was trained, and the template of those that `hfgen publish` writes, which installs with hfgen."""
