"""What one does with a model: a file for each `--option`, and what they share."""
