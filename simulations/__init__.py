"""Launching, recipes, results and the command line."""
