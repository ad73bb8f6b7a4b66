"""How the routers of a model spread tokens over experts: counted in training, read by the report."""
