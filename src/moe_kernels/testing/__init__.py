"""What the project's own tests stand on, importable by users: truth, tolerances, hostile routings, the interpreter layer."""
