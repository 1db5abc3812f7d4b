"""List the packages of the wheel, in which jobs/ and serve/ lie inside graft/; pyproject.toml says the rest.

At the top of site-packages, packages with such common names would hide those of others, or be hidden by them.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["graft", "graft.*"]),
        *(f"graft.{name}" for name in find_packages(include=["jobs", "jobs.*", "serve", "serve.*"])),
    ],
    package_dir={"graft.jobs": "jobs", "graft.serve": "serve"},
)
