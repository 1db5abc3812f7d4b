"""The measurements of `python -m jobs.bench`, a module for each part of graft."""
