"""What every room stands on: predictions, input checks, module surgery, statistics, persistence, progress."""
