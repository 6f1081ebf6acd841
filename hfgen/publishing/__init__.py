"""From a run to a Hub repo that loads anywhere."""
