"""What is done to a model that takes rows."""
