"""What every training shares: the step, precision, schedule, run folder, memory and devices."""
