"""What goes to the Hub: the card and the upload."""
