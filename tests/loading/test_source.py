"""Ids of models on the hub: from a cache made by hand, without a network."""

from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from tracelens import load
from tracelens.errors import CheckpointError, CheckpointNotFoundError
from tracelens.loading import Checkpoint
from tracelens.loading.source import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def cached(cache, tiny_folder) -> Path:
    """The cached snapshot of `org/tiny`, with blobs and links as huggingface_hub lays them."""
    return put_into_cache(cache, "org/tiny", tiny_folder)


def put_into_cache(cache: Path, repository: str, folder: Path, *, ref: str = "main", commit: str = COMMIT) -> Path:
    home = cache / ("models--" + repository.replace("/", "--"))
    snapshot = home / "snapshots" / commit
    for made in (home / "blobs", home / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    for file in folder.iterdir():
        blob = home / "blobs" / f"{commit[:8]}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def offline(*args, **kwargs):
    raise httpx.ConnectError("no route to host")


def test_a_cached_model_loads_without_a_network(cached, tiny_model, no_network):
    model = load("org/tiny", local_files_only=True)
    assert torch.equal(model(IDS), tiny_model(IDS))
    assert model.cfg.model_name == "org/tiny"
    assert model.to_tokens("the cat").tolist() == tiny_model.to_tokens("the cat").tolist()


def test_the_cache_is_used_when_the_hub_cannot_be_reached(cached, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    assert resolve("org/tiny") == cached


def test_offline_mode_is_honoured(cached, monkeypatch, no_network):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/tiny") == cached


def test_revisions(cache, cached, tmp_path, tiny_folder, no_network):
    from tests.tiny import write_checkpoint

    other = write_checkpoint(tmp_path / "other", seed=1)
    put_into_cache(cache, "org/tiny", other, ref="v2", commit="f" * 40)
    same = Checkpoint("org/tiny", local_files_only=True)
    new = Checkpoint("org/tiny", revision="v2", local_files_only=True)
    by_commit = Checkpoint("org/tiny", revision="f" * 40, local_files_only=True)
    name = "model.norm.weight"
    assert torch.equal(same.tensor(name), Checkpoint(tiny_folder).tensor(name))
    assert torch.equal(new.tensor(name), Checkpoint(other).tensor(name))
    assert torch.equal(by_commit.tensor(name), new.tensor(name))
    with pytest.raises(CheckpointNotFoundError, match=r"cache does not hold 'org/tiny' at revision 'v3'.*hf download"):
        Checkpoint("org/tiny", revision="v3", local_files_only=True)


def test_what_is_not_cached_says_how_to_get_it(cache, no_network):
    with pytest.raises(CheckpointNotFoundError, match=r"cache does not hold 'org/none' in full.*hf download org/none"):
        load("org/none", local_files_only=True)


def test_an_interrupted_download_is_named(cache, tmp_path, no_network):
    from tests.tiny import write_checkpoint

    folder = write_checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    snapshot = put_into_cache(cache, "org/sharded", folder)
    (home,) = (shard for shard in snapshot.iterdir() if shard.name.startswith("model-00002"))
    target = home.resolve()
    home.unlink()
    target.rename(target.with_suffix(".incomplete"))
    with pytest.raises(CheckpointError, match=r"lacks model-00002.* interrupted download .*run it again"):
        load("org/sharded", local_files_only=True)

    only = put_into_cache(cache, "org/single", write_checkpoint(tmp_path / "single"))
    (only / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors.*get the whole"):
        load("org/single", local_files_only=True)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["model.safetensors", "pytorch_model.bin", "onnx/model.safetensors"], "*.safetensors"),
        (["pytorch_model.bin", "qmodel.pt"], "*.bin"),
        (["qmodel.pt", "config.json"], "*.pt"),
    ],
)
def test_one_kind_of_weights_is_downloaded(monkeypatch, tmp_path, files, kind):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository, revision: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/model", revision="v2") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("org/model", "v2")
    assert [p for p in asked["allow_patterns"] if p in ("*.safetensors", "*.bin", "*.pt")] == [kind]
    assert "*.json" in asked["allow_patterns"]
    assert asked["ignore_patterns"] == ["*/*"]


def test_gguf_files_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["m-Q4_K_M.gguf", "m-Q8_0.gguf"])
    with pytest.raises(CheckpointError, match=r"holds GGUF files .*name one: 'org/m/m-Q4_K_M\.gguf'"):
        resolve("org/m")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, **options: asked.append((args, options)) or str(tmp_path / "f"),
    )
    assert resolve("org/m/m-Q8_0.gguf", revision="v2") == tmp_path / "f"
    assert asked == [(("org/m", "m-Q8_0.gguf"), {"revision": "v2"})]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.GatedRepoError, CheckpointError, "is gated: accept its terms .*hf auth login"),
        (errors.RepositoryNotFoundError, CheckpointNotFoundError, "no model on the hub is called 'org/m'"),
        (errors.RevisionNotFoundError, CheckpointNotFoundError, "has no revision 'v9'"),
        (errors.HfHubHTTPError, CheckpointError, "the hub did not give .*try again later"),
    ],
)
def test_what_the_hub_answers_is_said_in_words(cache, monkeypatch, error, kind, message):
    def refuse(*args, **kwargs):
        response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise error("no", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(kind, match=message):
        resolve("org/m", revision="v9" if error is errors.RevisionNotFoundError else None)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path, no_network):
    source = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "gguf" / "Q4_K_M" / "llama"
    assert resolve(source) == source / "model.gguf"
    assert Checkpoint(source).format.startswith("gguf")
    for name in ("a-Q4.gguf", "a-Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(a-Q4\.gguf, a-Q8\.gguf\); give the path of one"):
        resolve(tmp_path)


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert resolve("org/tiny") == Path("org/tiny")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/at/all", "a/b/c", "a b", "nothing.gguf", ""])
def test_what_is_no_id_is_not_looked_for_on_the_hub(source, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointNotFoundError, CheckpointError)):
        resolve(source + "" if source else Path("nothing"))
