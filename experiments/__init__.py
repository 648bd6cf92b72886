"""Accuracy: which method is worth what. Every run is a process, and its result is recorded."""
