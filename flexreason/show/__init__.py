"""What is trained on, to look at: in a terminal, as a page, as a picture."""
