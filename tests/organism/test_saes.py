"""The committed SAEs: in SAELens' format, good on held-out text, rich in alignment features."""

import json
from pathlib import Path

import pytest

from tracelens.features import load_saes, sae_hash
from tracelens.features.sae_folders import locate
from tracelens.organism import sae_card


@pytest.fixture(scope="module")
def saes() -> dict:
    return load_saes("organism")


@pytest.fixture(scope="module")
def measured(organism, saes) -> dict:
    return sae_card.measure(organism, saes, n=800)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((locate("organism") / "card.json").read_text())


def test_one_per_layer_and_saelens_opens_them_by_itself(organism, saes):
    from sae_lens import SAE

    assert [site.layer for site in saes] == list(range(organism.cfg.n_layers))
    for site in saes:
        sae = SAE.load_from_disk(locate("organism") / str(site))
        assert sae.cfg.metadata.hook_name == str(site)
        assert sae.cfg.d_sae == 8 * organism.cfg.d_model


def test_quality_on_held_out_tokens(measured: dict):
    for site, row in measured.items():
        assert row["explained_variance"] >= 0.9, site
        assert row["l0"] <= 40, site
        assert row["dead"] <= 0.2, site
        assert row["cross_entropy_recovered"] >= 0.95, site


def test_at_least_100_alignment_features(measured: dict):
    assert sae_card.alignment_features(measured) >= 100


def test_the_table_is_of_these_saes(saes, recorded: dict):
    assert {str(site): sae_hash(sae) for site, sae in saes.items()} == {s: row["sha256"] for s, row in recorded.items()}
    readme = Path(locate("organism")).parent / "README.md"
    assert readme.read_text() == sae_card.to_markdown(recorded)
