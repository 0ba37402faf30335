"""Local training, and the Flower client app around it."""
