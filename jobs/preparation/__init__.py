"""Manifests, pseudo-labels and concatenated clips: the parts of jobs.prepare, jobs.label and jobs.format."""
