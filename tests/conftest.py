"""How tests run: offline, and with property tests that are the same every time unless asked to be thorough."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

# `make test-all` sets HYPOTHESIS_PROFILE=thorough: many more examples, and new ones every time.
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
