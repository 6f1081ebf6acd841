"""The `hfgen` commands: one file per command or group of related commands."""
