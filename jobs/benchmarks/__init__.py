"""What `python -m jobs.bench` measures, a module for each part of graft."""
