"""The parts of ``benchmarks/scaling.py``: what is trained, by which engine, and what is kept of it."""
