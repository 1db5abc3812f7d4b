"""The commands of graft: each module here is one, run as `graft COMMAND --recipe NAME key=value ...`.

In a checkout `python -m jobs.COMMAND` is the same command.
"""

COMMANDS = {
    "transcribe and serve": ("transcribe", "serve"),
    "prepare speech": ("prepare", "label", "format"),
    "train": ("build", "stage1", "stage2", "check", "merge", "export"),
    "measure": ("evaluate", "score", "report", "ablate", "bench"),
    "try and submit": ("demo", "submit", "schema"),
}
"""The commands by what they are for. `serve` is not a module here: it is in the package of the service."""
