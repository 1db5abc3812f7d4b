"""Code that every job shares: the command line, the Ray cluster, the console and output folders."""
