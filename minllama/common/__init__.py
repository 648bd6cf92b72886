"""What every room stands on, and no PyTorch: errors, programs, files, settings."""
