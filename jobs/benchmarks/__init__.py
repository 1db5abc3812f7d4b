"""What `python -m jobs.bench` measures, one benchmark a file."""
