"""Test sets, their scores and comparisons: the parts of jobs.evaluate, jobs.ablate and jobs.merge."""
