"""Holds our own `dassl` package; this folder goes on sys.path only where the real Dassl is not installed."""
