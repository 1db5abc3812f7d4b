"""Test that Ray's own processes stay light: what they import to start training workers and to stream batches is free of torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["jobs.training.ray_entry", "jobs.training.ray_dataset"])
def test_the_modules_that_ray_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
