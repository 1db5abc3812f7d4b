"""The commands of graft: each module here is one, run as `python -m jobs.COMMAND --recipe FILE key=value ...`."""

COMMANDS = (
    ("prepare", "label", "format"),
    ("build", "stage1", "stage2", "check", "merge", "export"),
    ("transcribe",),
    ("evaluate", "ablate"),
    ("demo", "submit", "bench"),
)
"""The commands in the order of a project's life, in groups."""
