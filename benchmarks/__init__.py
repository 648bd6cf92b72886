"""Speed and memory: each script prints numbers that the docs quote."""
