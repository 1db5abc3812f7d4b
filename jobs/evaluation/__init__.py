"""Test sets, and the comparison of merged weights: parts of jobs.evaluate, jobs.ablate and jobs.merge."""
