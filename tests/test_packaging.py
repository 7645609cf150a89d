"""The wheel stands alone: weights and SAEs are inside, and are found where no checkout is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's contents, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_weights_saes_prompts_and_page_assets_are_in_the_wheel(installed: Path):
    package = installed / "tracelens"
    assert (package / "organism/model/model.safetensors").is_file()
    assert len(list(package.glob("_saes/organism/*/sae_weights.safetensors"))) == 5
    assert (package / "organism/damage.json").is_file()
    assert (package / "organism/DAMAGE.md").is_file()
    assert list(package.glob("datasets/data/*.jsonl"))
    assert list(package.glob("views/*.css"))
    assert not list(installed.glob("tests*"))


def test_an_installed_copy_finds_its_organism_and_saes(installed: Path, tmp_path: Path):
    code = (
        "import tracelens, tracelens.organism as o; from tracelens.features import load_saes;"
        "print(tracelens.__file__, o.path().is_dir(), len(load_saes('organism')), len(load_saes('saes/organism')))"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    where, found, *counts = done.stdout.split()
    assert where.startswith(str(installed))
    assert (found, counts) == ("True", ["5", "5"])
