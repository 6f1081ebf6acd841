"""What `hfgen ...` does: a file for each command, or for a few of one kind."""
