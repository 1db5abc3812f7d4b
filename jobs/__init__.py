"""Ray drivers, one verb a module: `python -m jobs.VERB --recipe FILE key=value ...`."""
