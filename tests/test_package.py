"""What is installed: a wheel that holds the package and nothing else, a source distribution in which the README's links
lead somewhere, and imports that cost no more than torch's own."""

import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import flexreason
from training import environment, write_data, write_model

ROOT = Path(__file__).parents[1]
NAMES = ("build", "dist", ".*", "*.egg-info", "__pycache__", "here")


def run(*command, **more):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NAMES))
    code = "import setuptools.build_meta as backend, sys; print(backend.build_{}(sys.argv[1]))"
    run(sys.executable, "-W", "error", "-c", code.format("sdist"), folder, cwd=folder / "source")
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    run(sys.executable, "-W", "error", "-c", code.format("wheel"), folder, cwd=unpacked)
    [wheel] = folder.glob("*.whl")
    return unpacked, wheel


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    assert wheel.name == f"flexreason-{flexreason.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [about] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = message_from_string(archive.read(about).decode())
    wanted = {path for path in (ROOT / "flexreason").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(ROOT).as_posix() for path in wanted}
    assert metadata["Version"] == flexreason.__version__ == "0.1.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(metadata.get_all("Provides-Extra")) == project["optional-dependencies"].keys()
    assert {line for line in metadata.get_all("Requires-Dist") if "extra" not in line} == set(project["dependencies"])
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def headings(text):
    """The anchors that a page's headings have."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_links_of_the_long_description_lead_somewhere(built):
    """In the source distribution, which is unpacked like the repository."""
    source, _ = built
    text = (source / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 5
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            assert (source / path).exists(), link
            assert not anchor or anchor in headings((source / path).read_text()), link


def test_the_source_distribution_has_what_the_repository_has(built):
    """So that its tests can be run."""
    source, _ = built
    for folder in ("flexreason", "tests", "docs", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and not {"__pycache__", "here", ".hypothesis"} & set(path.parts)
                and not path.name.startswith(".")
            ):
                assert (source / path.relative_to(ROOT)).exists(), path
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml", "requirements-least.txt"):
        assert (source / name).exists(), name


def seconds(*arguments):
    start = time.perf_counter()
    run(sys.executable, *arguments, env=environment())
    return time.perf_counter() - start


@pytest.mark.parametrize("arguments", [("-c", "import flexreason"), ("-m", "flexreason", "--help")])
def test_a_start_takes_a_second_at_most_beside_torchs_own(arguments):
    """The quickest of some, in turn, since other processes take time too."""
    pairs = [(seconds(*arguments), seconds("-c", "import torch")) for _ in range(4)]
    ours, torchs = map(min, zip(*pairs, strict=True))
    assert ours < torchs + 1


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An empty environment: a folder of programs, and what installs into it."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    return folder / "bin"


CORE = """
import flexreason as fr
from transformers import Qwen3Config, Qwen3ForCausalLM
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8))
layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
report = fr.verify(model, [layout])
assert report.ok, report
fr.patch(model)(**fr.collate([layout])).loss.backward()
"""


@pytest.mark.slow
def test_it_installs_in_an_empty_environment_without_extras_and_with_them(built, empty, tmp_path):
    """Takes what a package index has: minutes, and gigabytes where its torch brings CUDA."""
    _, wheel = built
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "chats.jsonl", n=40)
    clean = {"PATH": str(empty), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    train = ["train", "--model", model, "--data", data, "--output", tmp_path / "out", "--length", 1024, "--steps", 2]

    def installed(command, *arguments):
        return subprocess.run(
            [empty / command, *map(str, arguments)], env=clean, cwd=tmp_path, capture_output=True, text=True
        )

    run(empty / "pip", "install", "--quiet", wheel)
    assert installed("flexreason", "--version").stdout.startswith(f"flexreason {flexreason.__version__}")
    done = installed("python", "-W", "error::ImportWarning", "-c", CORE)
    assert done.returncode == 0, done.stderr
    assert installed("flexreason", "show").returncode == 0
    assert installed("flexreason", "report", "--data", data, "--tokenizer", model).returncode == 0
    without = installed("flexreason", *train)
    assert without.returncode == 2
    assert "pip install 'flexreason[train]'" in without.stderr

    run(empty / "pip", "install", "--quiet", f"{wheel}[sft,plot]")
    done = installed("flexreason", *train)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    done = installed("python", ROOT / "examples" / "sft.py", tmp_path / "out" / "model", data, tmp_path / "sft")
    assert done.returncode == 0, done.stderr
    assert run(empty / "pip", "check") == "No broken requirements found.\n"
