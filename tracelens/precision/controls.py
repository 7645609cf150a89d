"""Controls: models that are as far from the reference as the quantized one, but for no reason."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import PairMismatchError, PrecisionSpecError
from tracelens.precision.sharing import copy_sharing
from tracelens.precision.weights import weight_matrices


@torch.no_grad()
def matched_noise(reference: Any, quantized: Any, seed: int = 0) -> Any:
    """The reference plus Gaussian noise, in every parameter that `quantized` changes, of the Frobenius norm of that
    change.

    Tensor by tensor, so each layer is as far from the reference as in `quantized`, in a random direction. The noise
    depends on `seed` and the tensor's name only (drawn on the CPU), not on the device or on which other tensors
    differ. Parameters that agree are shared with `reference`. Rounding of activations has no counterpart: the noise
    matches the error of the weights.
    Raises `PairMismatchError` if the models' parameters differ in name or shape.
    """
    return _with_errors(reference, quantized, lambda name, error: _noise(name, error, seed), "matched noise")


@torch.no_grad()
def permuted_error(reference: Any, quantized: Any, seed: int = 0) -> Any:
    """The reference plus the quantized model's own weight error, shuffled within each row.

    A row is what feeds one output channel of a linear layer (the last axis of any other tensor): each keeps its errors and
    loses which input they belong to. So what remains is the size and the distribution of the error. Deterministic in `seed`
    and the tensor's name. Shares what agrees and raises as `matched_noise`.
    """
    rows = {weight.name: weight for weight in weight_matrices(reference)} if _is_hooked(reference) else {}

    inputs_first = _inputs_first(reference)

    def shuffled(name: str, error: Tensor) -> Tensor:
        weight = rows.get(name)
        if name in inputs_first:
            return _shuffle_rows(error.T, _generator(name, seed)).T
        if weight is None:
            return _shuffle_rows(error, _generator(name, seed))
        as_matrix = replace(weight, parameter=error)
        return as_matrix.restore(_shuffle_rows(as_matrix.matrix, _generator(name, seed)))

    return _with_errors(reference, quantized, shuffled, "permuted error")


def _is_hooked(model: Any) -> bool:
    try:
        return any(True for _ in weight_matrices(model))
    except PrecisionSpecError:
        return False


def _inputs_first(model: Any) -> set[str]:
    """Weights of transformers' `Conv1D`, GPT-2's linear layer, whose matrix lies the other way round; bridges hold such."""
    # By identity: a bridge has names of its own for parameters.
    weights = {id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"}
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def _with_errors(reference: Any, quantized: Any, made_of: Callable[[str, Tensor], Tensor], what: str) -> Any:
    """The reference plus what `made_of` makes of the float64 error of each parameter that differs."""
    weights, others = dict(reference.named_parameters()), dict(quantized.named_parameters())
    unlike = [
        name
        for name in dict.fromkeys([*weights, *others])
        if name not in weights or name not in others or weights[name].shape != others[name].shape
    ]
    if unlike:
        raise PairMismatchError(
            f"{what} needs the same parameters in both models; {len(unlike)} are missing in one or differ in "
            f"shape: {', '.join(unlike[:5])}"
        )
    changed = {
        name: weight + made_of(name, others[name].to(weight.device, torch.float64) - weight.to(torch.float64))
        for name, weight in weights.items()
        if not torch.equal(weight, others[name].to(weight))
    }
    return copy_sharing(reference, {name: tensor.to(weights[name].dtype) for name, tensor in changed.items()})


def _shuffle_rows(error: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.rand(error.shape, generator=generator).argsort(-1).to(error.device)
    return error.gather(-1, order)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _noise(name: str, error: Tensor, seed: int) -> Tensor:
    """Float64 Gaussian noise of the shape and Frobenius norm of `error`."""
    noise = torch.randn(error.shape, generator=_generator(name, seed), dtype=torch.float64).to(error.device)
    return noise * (error.norm() / noise.norm())
