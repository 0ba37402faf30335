"""``fedlora report --html``: runs as one page that needs nothing but itself."""
