"""Accuracy: compare methods. Every run is a process, and its result is recorded."""
