"""What the project's own tests stand on, importable by users: truth, tolerances, routings, interpreter, compiler."""
