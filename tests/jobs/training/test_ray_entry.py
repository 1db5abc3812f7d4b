"""Test that the modules which Ray's own processes import do not import torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["jobs.training.ray_entry", "jobs.training.ray_dataset"])
@pytest.mark.processes
def test_the_modules_that_ray_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
