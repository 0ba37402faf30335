"""Deployments on Flower's SuperLink and SuperNodes: made, checked, run."""
