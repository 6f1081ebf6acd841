"""Drawing with a trained pipeline, and pictures of what it draws."""
