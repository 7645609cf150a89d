"""`Checkpoint`: config, tokenizer and lazily read, dequantized tensors of a folder, a GGUF file or a hub repository."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike
from os.path import abspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import CheckpointError, NonFiniteError
from tracelens.loading.architectures import ARCHITECTURES, Architecture
from tracelens.loading.description import Description, describe
from tracelens.loading.files import SafetensorFiles, TensorFiles, TorchFiles, read_json
from tracelens.loading.formats import Layout, Quantized, Scheme, Stored, find_layout
from tracelens.loading.formats.base import Read, one_above_the_other
from tracelens.loading.source import resolve

SINGLE = ("model.safetensors", "pytorch_model.bin", "qmodel.pt")
"""Weights in one file, in the order of preference; each of the first two may come in shards with an index."""
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OTHER_MODELS = ("adapter_model.safetensors", "consolidated.safetensors")
"""Names of what is no model, or a model under other names."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Checkpoint:
    """A model on disk: config, tensors and, usually, a tokenizer.

    Opening reads the config and the headers of the weight files, and finds out how they are quantized; a tensor is
    read, and dequantized, when it is asked for. Only tensors are unpickled, no remote code runs, and nothing is
    downloaded for what lies on this machine.

    `path`: a folder with `config.json` and weights (safetensors, or `pytorch_model.bin`; one file, or shards with an
    index), a `.gguf` file, or the id of a hub repository (`"org/model"`; `revision` is a branch, tag or commit of it,
    and with `local_files_only` only what the cache holds is used). `name` is what results call the model: by default
    the folder's own name, or the id.

    Raises:
        CheckpointNotFoundError: there is no such folder, file or repository.
        CheckpointError: config or weights are missing or damaged, or quantized in a way that cannot be undone.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        name: str | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        round_to: torch.dtype | None = None,
    ) -> None:
        self.round_to = round_to
        self.path = resolve(path, revision=revision, local_files_only=local_files_only)
        # abspath, not resolve: the path may be `.`, and a link keeps the name it was given.
        on_disk = Path(path).expanduser().exists()
        self.name = name or (Path(abspath(Path(path).expanduser())).name if on_disk else str(path))
        if self.path.is_file():
            from tracelens.loading.gguf import open_gguf

            self.config, files = open_gguf(self.path)
        else:
            self.config, files = _read_config(self.path), _open_folder(self.path)
        self._stored = Stored(self.path, self.config, files)
        self.layout: Layout | None = find_layout(self._stored)
        """How it is quantized; None for full precision."""
        self._homes = self._names()

    def __repr__(self) -> str:
        kind = (self.config.get("architectures") or ["unknown architecture"])[0]
        return f"Checkpoint({str(self.path)!r}: {kind}, {self.format})"

    @property
    def format(self) -> str:
        """How the weights are stored: a quantized format with its variant, or `full precision`."""
        return self.layout.format if self.layout else "full precision"

    @property
    def architecture(self) -> str:
        """The architecture that config.json declares, e.g. `LlamaForCausalLM`."""
        declared = self.config.get("architectures")
        if not declared:
            raise CheckpointError(
                f"{self.path / 'config.json'} does not say which architecture it is; "
                'add, for example, "architectures": ["LlamaForCausalLM"]'
            )
        return declared[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers opens it, chat template included; None if the checkpoint has none."""
        if self.path.is_file():
            from tracelens.loading.gguf_tokenizer import open_gguf_tokenizer

            return open_gguf_tokenizer(self.path, self._stored.files.values)
        if any((self.path / file).is_file() for file in TOKENIZER_FILES):
            options = {"pretrained_model_name_or_path": self.path}
        else:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(**options, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer in {self.path} cannot be opened ({error}); repair or remove its tokenizer files"
            ) from error

    def names(self) -> list[str]:
        """Names of all tensors of the plain model, as in its state dict, in the order of the files."""
        return list(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def quantized(self, name: str) -> Quantized | None:
        """How a tensor is quantized; None if it is simply stored."""
        home = self._homes[self._need(name)]
        return home if isinstance(home, Quantized) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the plain model, from the headers."""
        home = self._homes[self._need(name)]
        return home.shape if isinstance(home, Quantized) else self._stored.shape(home)

    def parts(self, name: str) -> tuple[str, ...]:
        """Stored names of what a tensor is made from: its own, or those of codes, scales and zero points."""
        home = self._homes[self._need(name)]
        return home.parts if isinstance(home, Quantized) else (home,)

    def adds_nothing(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros on a quantized layer: AutoGPTQ writes one for layers that have none."""
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        return kind == "bias" and isinstance(self._homes.get(weight), Quantized) and not self.tensor(name).any()

    @property
    def stored(self) -> Stored:
        """The tensors as they are stored."""
        return self._stored

    def describe(self) -> Description:
        """What is quantized and how, what is not, and how many bytes each takes; prints as a table."""
        return describe(self)

    def tensor(self, name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as it is quantized, read now, dequantized in float32 and then converted; for a
        CUDA device it is dequantized there.

        Raises:
            CheckpointError: there is no such tensor, or it is not a floating-point one and no format knows it.
            NonFiniteError: it holds NaN or infinity, as stored or because a value does not fit `dtype`.
        """
        return self._read(name, dtype, device, fold=False)

    def weight(self, name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as the plain model needs it: `tensor`, and folded into it what the quantized model computes beside
        the layer (AWQ divides activations by scales; no other format does). Raises what `tensor` raises."""
        return self._read(name, dtype, device, fold=True)

    def _read(self, name: str, dtype: torch.dtype, device: torch.device | str, *, fold: bool) -> Tensor:
        home = self._homes[self._need(name)]
        # Other accelerators lack some of the types that codes and tables are in.
        where = device if torch.device(device).type == "cuda" else "cpu"
        if isinstance(home, Quantized):
            exact = self._dequantized(name, home, lambda part: self._stored.read(part, where), fold)
        else:
            exact = self._stored.read(home, where)
            if exact.dtype not in FLOATS:
                raise CheckpointError(
                    f"tensor {name!r} in {self.path} is stored as {exact.dtype} and belongs to no format that is "
                    "known; get the full-precision original, or the checkpoint's own config.json"
                )
        converted = exact.to(device=device, dtype=dtype)
        if not is_finite(converted):
            self._refuse_non_finite(name, exact, dtype)
        return converted

    def gives_new_memory(self, name: str, dtype: torch.dtype) -> bool:
        """Whether `weight` makes a new tensor each time, instead of one that may be mapped from the file."""
        home = self._homes[self._need(name)]
        return isinstance(home, Quantized) or self._stored.dtype(home) != dtype

    def _dequantized(self, name: str, how: Quantized, read: Read, fold: bool) -> Tensor:
        exact = how.dequantize(read)
        if (
            exact.device.type == "cpu" and len(how.parts) == 1 and _same_memory(exact, read(how.parts[0]))
        ):  # only put into another order
            exact = exact.clone()
        if fold and how.fold:
            exact = how.fold(read, exact)
        if tuple(exact.shape) != tuple(how.shape) or exact.dtype != torch.float32:
            raise CheckpointError(
                f"tensor {name!r} in {self.path} dequantizes to {exact.dtype} {list(exact.shape)}, "
                f"expected float32 {list(how.shape)}; its config and its tensors disagree"
            )
        return exact if self.round_to is None else exact.to(self.round_to)

    def _refuse_non_finite(self, name: str, exact: Tensor, dtype: torch.dtype) -> None:
        if is_finite(exact):
            raise NonFiniteError(f"tensor {name!r} in {self.path} overflows {dtype}; load with dtype=torch.float32")
        bad = int((~exact.isfinite()).sum())
        guilty = [part for part in self.parts(name) if part != name and not is_finite(self._stored.read(part))]
        because = f" (through {', '.join(guilty)})" if guilty else ""
        raise NonFiniteError(
            f"tensor {name!r} in {self.path} holds NaN or infinity in {bad} of {exact.numel()} values{because}; "
            "the checkpoint is damaged, or its training or quantization diverged: get it again"
        )

    def _need(self, name: str) -> str:
        if name in self._homes:
            return name
        if (plain := self._plain_name(name)) in self._homes:
            return plain
        raise CheckpointError(f"{self.path} has no tensor {name!r}; `names()` lists those it has")

    @property
    def _row(self) -> Architecture | None:
        """What is known of the architecture; None if it has no conversion."""
        return ARCHITECTURES.get((self.config.get("architectures") or [""])[0])

    def _plain_name(self, name: str) -> str:
        return self._row.canonical(name) if self._row else name

    def _names(self) -> dict[str, str | Quantized]:
        """Plain name -> stored name, or how it is quantized."""
        homes: dict[str, str | Quantized] = {}
        for name, home in self._found():
            plain = self._plain_name(name)
            if plain in homes:
                raise CheckpointError(f"{self.path} holds {plain!r} twice, as {name!r} too; get the checkpoint again")
            homes[plain] = home
        for whole, parts in (self._row.joined if self._row else {}).items():
            homes = self._join(homes, whole, parts)
        return homes

    def _join(
        self, homes: dict[str, str | Quantized], whole: str, parts: tuple[str, ...]
    ) -> dict[str, str | Quantized]:
        """The same, with tensors whose names end in `parts` as one, which the plain model has under another name."""
        joined: dict[str, str | Quantized] = {}
        for name, home in homes.items():
            part = next((part for part in parts if name.endswith("." + part)), None)
            prefix = name.removesuffix(part) if part else name
            pieces = [homes[prefix + piece] for piece in parts if part and prefix + piece in homes]
            if len(pieces) < len(parts) or prefix + whole in homes:
                joined[name] = home
            elif prefix + whole not in joined:
                joined[prefix + whole] = one_above_the_other([self._as_quantized(piece) for piece in pieces])
        return joined

    def _as_quantized(self, home: str | Quantized) -> Quantized:
        if isinstance(home, Quantized):
            return home
        scheme = Scheme("float", 8 * self._stored.dtype(home).itemsize)
        return Quantized(self._stored.shape(home), (home,), scheme, lambda read: read(home).to(torch.float32))

    def _found(self) -> Iterator[tuple[str, str | Quantized]]:
        layout = self.layout or Layout("full precision", {})
        first = {quantized.parts[0]: name for name, quantized in layout.tensors.items()}
        spoken_for = {part for quantized in layout.tensors.values() for part in quantized.parts}
        spoken_for |= {*layout.runtime, *layout.renamed.values()}
        back = {stored: name for name, stored in layout.renamed.items()}
        assert len(first) == len(layout.tensors), "the first part of a quantized weight is its own"
        for stored in self._stored.names:
            if stored in first:
                yield first[stored], layout.tensors[first[stored]]
            elif stored in back:
                yield back[stored], stored
            elif stored not in spoken_for:
                yield stored, stored


def open_checkpoint(
    source: str | PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    round_to: torch.dtype | None = None,
) -> Checkpoint:
    """What a source names, opened: `"organism"` is the embedded model, a `Checkpoint` is passed through as it is.

    Raises `CheckpointError` for a `Checkpoint` that rounds otherwise, and what opening one raises.
    """
    if isinstance(source, Checkpoint):
        if round_to not in (None, source.round_to):
            raise CheckpointError(
                f"round_to={round_to} comes too late for a checkpoint that is open; say Checkpoint(..., round_to=...)"
            )
        return source
    if source == "organism":
        from tracelens.organism import path

        return Checkpoint(path(), "organism")
    return Checkpoint(source, revision=revision, local_files_only=local_files_only, round_to=round_to)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; of no use for 8-bit floats and integers, which it calls finite."""
    if tensor.dtype not in FLOATS or not tensor.numel():
        return True
    # Extremes propagate NaN and, unlike an elementwise test, need no memory of the tensor's size.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def shortened(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint folder holds config.json and weights, "
            "as `model.save_pretrained(FOLDER)` writes them"
        )
    return read_json(folder / "config.json")


def _open_folder(folder: Path) -> TensorFiles:
    for single, index, opened in zip(SINGLE, (*INDEX, None), (SafetensorFiles, TorchFiles, TorchFiles), strict=True):
        if (folder / single).is_file():
            return opened([folder / single])
        if index and (folder / index).is_file():
            shards = _shards(folder, index)
            files = opened([folder / shard for shard in dict.fromkeys(shards.values())])
            homes = {name: files.home(name) for name in files.names()}
            if wrong := sorted(name for name in homes.keys() | shards.keys() if homes.get(name) != shards.get(name)):
                raise CheckpointError(
                    f"{index} and the shards of {folder} disagree on {shortened(wrong)}; get the checkpoint again"
                )
            return files
    # AutoGPTQ once named its files after bits and group size: gptq_model-4bit-128g.safetensors.
    named = [file for file in folder.glob("*.safetensors") if file.name not in OTHER_MODELS]
    if len(named) == 1:
        return SafetensorFiles(named)
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
    found = f" (it has {shortened(others, 4)})" if others else ""
    raise CheckpointError(
        f"{folder} has none of {', '.join((*SINGLE, *INDEX))}{found}; get the whole checkpoint, or open the model with "
        "transformers and write it again with `model.save_pretrained(FOLDER)`"
    )


def _shards(folder: Path, index: str) -> Mapping[str, str]:
    """Tensor name -> shard, as the index has it."""
    shards = read_json(folder / index).get("weight_map")
    if not shards or not isinstance(shards, Mapping):
        raise CheckpointError(f"{folder / index} has no weight_map; get the checkpoint again")
    for shard in dict.fromkeys(shards.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{folder / index} refers to {shard!r}, outside the folder, and was not followed; "
                "get the checkpoint from a place you trust"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder} lacks {shard}, which {index} refers to; get the missing shard (an interrupted download "
                "leaves such gaps: run it again)"
            )
    return shards
