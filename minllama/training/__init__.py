"""Shared by both trainings: the step, precision, schedule, run folder, memory and devices."""
