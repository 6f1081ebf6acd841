"""The model card and the upload to the Hub."""
