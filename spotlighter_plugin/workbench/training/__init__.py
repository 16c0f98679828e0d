"""What train.py does: settings, one run, its log, and experiments in one process."""
