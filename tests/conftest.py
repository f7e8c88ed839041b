"""How tests run: offline, and with property tests that are the same every time unless asked to be thorough.

`--rehearse` runs the tests marked `gpu` on the CPU, at small sizes: it shows that they run from end to end, and nothing
about a GPU.
"""

import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

# never the user's own folder, in processes that tests start neither
os.environ["FLEXREASON_CACHE"] = tempfile.mkdtemp(prefix="flexreason-tests-")

import pytest
import torch
from hypothesis import settings

# what is printed goes by neither the terminal that tests run in nor its owner's taste
os.environ["COLUMNS"] = "100"
os.environ.pop("NO_COLOR", None)
os.environ.pop("FORCE_COLOR", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

# `make test-all` sets HYPOTHESIS_PROFILE=thorough: many more examples, and new ones every time.
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish():
    """What is imported stays: who collects garbage, as measuring memory does, need not look through it each time."""
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["FLEXREASON_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--in-browser", action="store_true", help="run the tests that need Chromium")
    parser.addoption("--rehearse", action="store_true", help="run the tests marked gpu on the CPU, at small sizes")


@pytest.fixture(scope="session")
def chromium(request):
    """A real browser, headless. Asked for, it must be there."""
    if not request.config.getoption("--in-browser"):
        pytest.skip("needs a browser: make test-browser")
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    assert found, "--in-browser: there is no command chromium; make test-browser installs it on Debian"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*quiet, "--disable-component-update"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def rehearsal(request):
    """Whether the tests marked `gpu` run on the CPU."""
    return request.config.getoption("--rehearse")


@pytest.fixture(scope="session")
def device(rehearsal):
    """Where the tests marked `gpu` compute: on the GPU, or else nowhere, unless this is a rehearsal."""
    if rehearsal:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU here; --rehearse runs these tests on the CPU")
    return "cuda"
