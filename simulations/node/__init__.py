"""A trainer that stays on its node with the model loaded, and the thin client app before it."""
