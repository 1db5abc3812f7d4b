"""How Ray Serve runs HAProxy: its variables, and what is added to its configuration."""
