"""From a run to a repo of the Hub that loads anywhere."""
