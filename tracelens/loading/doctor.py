"""`doctor`: is the loaded model the model on disk, and is that one what was quantized?

Without a reference: every tensor has its place, all values are finite, and the hooked model computes what a plain
transformers model with the same weights does. With one: each weight differs from the reference's by what its format's
rounding makes, and so do the logits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tracelens.errors import CheckpointNotFoundError, TracelensError, UnsupportedArchitectureError
from tracelens.loading.agreement import Ids, Logits, Rounded, differences, function, logits_of
from tracelens.loading.checkpoint import Checkpoint, open_checkpoint, shortened
from tracelens.loading.diagnosis import Check, Diagnosis, Function, TensorRow, Verdict
from tracelens.loading.equivalence import Expectation, Wiring, wiring
from tracelens.loading.faults import UNRELATED, compare
from tracelens.loading.formats.base import Quantized, Scheme
from tracelens.loading.load import Wrapper, load
from tracelens.loading.plain import build_plain

T = TypeVar("T")

LOGITS_AGREE = 1e-4
"""Largest difference of logits over the largest logit, float32: two orders of the same sums differ by 1e-6 to 1e-5."""
FUNCTION_LIMIT = 3.0
"""Error of the logits over that of rounding to nearest up to which a quantizer is itself."""
FUNCTION_WRONG = 10.0
"""Beyond this, weights that agree do not explain the logits."""
UNKNOWN = Wiring({}, {}, "")
"""The wiring of a model that does not run: weights are compared one by one."""
BATCH, LENGTH = 4, 32
"""Random tokens for which logits are compared."""
PLAIN = Scheme("float", 16)
"""How far a tensor that is not quantized may be from its reference: one was perhaps stored in bfloat16."""
SAME_MODEL = {
    **{"hidden_size": ("n_embd", "d_model"), "num_hidden_layers": ("n_layer",), "num_attention_heads": ("n_head",)},
    **{"num_key_value_heads": (), "head_dim": (), "vocab_size": (), "hidden_act": ("activation_function",)},
    **{"rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon"), "rope_theta": ("rotary_emb_base",)},
}
"""Settings of config.json that make another model, with their older names."""


def doctor(
    source: str | PathLike[str] | Checkpoint,
    *,
    reference: str | PathLike[str] | Checkpoint | None = None,
    wrapper: Wrapper = "hooked",
    device: str | torch.device | None = None,
    tokens: Ids | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = False,
) -> Diagnosis:
    """Examines a checkpoint: *verified*, *degraded*, *wrong*, or *no reference*, with the evidence.

    Args:
        source: what `Checkpoint` takes: a folder, a `.gguf` file, the id of a model on the hub; or a `Checkpoint`.
        reference: the full-precision checkpoint that was quantized.
        wrapper: the hooked model to check, as in `load`; for an architecture without a `HookedTransformer` the bridge
            is checked.
        device: where models run; by default a GPU if there is one, else the CPU.
        tokens: token ids to compare logits on; by default random ones.
        revision: branch, tag or commit of `source` on the hub.
        local_files_only: use what the hub's cache holds, and no network.
        progress: show a bar over the tensors.

    Memory: two models at most, beside one pair of tensors. A checkpoint that cannot be opened or loaded is *wrong*, with
    the message as evidence.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CheckpointError: the reference cannot be opened.
    """
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    against = None if reference is None else open_checkpoint(reference, local_files_only=local_files_only)
    examination = _Examination(str(source.path if isinstance(source, Checkpoint) else source), on, tokens, progress)
    checkpoint = examination.attempt(
        "opens", lambda: open_checkpoint(source, revision=revision, local_files_only=local_files_only), _contents
    )
    if checkpoint is not None:
        examination.alone(checkpoint, wrapper)
        if against is not None:
            examination.beside(checkpoint, against)
    return examination.diagnosis(checkpoint, against is not None)


class _Examination:
    """What was seen so far."""

    def __init__(self, source: str, device: torch.device, tokens: Ids | None, progress: bool) -> None:
        self.source, self.device, self.tokens, self.progress = source, device, tokens, progress
        self.checks: list[Check] = []
        self.rows: list[TensorRow] = []
        self.function: Function | None = None
        self.notes: list[str] = []
        self.logits: Logits | None = None
        self.wiring: Wiring | None = None

    def attempt(self, name: str, action: Callable[[], T], evidence: Callable[[T], str]) -> T | None:
        """Runs a check that fails by raising; None if it did."""
        try:
            result = action()
        except CheckpointNotFoundError:
            raise
        except Exception as error:
            # A damaged file can break any library under us, each with errors of its own.
            kind = "" if isinstance(error, TracelensError) else f"{type(error).__name__}: "
            self.checks.append(Check(name, "failed", f"{kind}{error}"))
            return None
        self.checks.append(Check(name, "passed", evidence(result)))
        return result

    def decide(self, name: str, good: bool, evidence: str) -> None:
        self.checks.append(Check(name, "passed" if good else "failed", evidence))

    def each(self, names: Iterable[str], title: str) -> Iterable[str]:
        if not self.progress:
            return names
        from tqdm.auto import tqdm

        return tqdm(list(names), desc=title, unit="tensor", delay=2)

    def alone(self, checkpoint: Checkpoint, wrapper: Wrapper) -> None:
        """The checks that need no reference."""
        if checkpoint.layout:
            self.notes += checkpoint.layout.notes
        self.attempt("finite", lambda: self._read_all(checkpoint), "all values of {0} tensors are finite".format)
        plain = self.attempt(
            "plain model",
            lambda: build_plain(checkpoint, dtype=torch.float32, device=self.device),
            lambda model: f"transformers' {type(model).__name__} takes every tensor, and none is missing",
        )
        hooked = self._hooked(checkpoint, wrapper)
        if plain is None:
            return
        ids = self._ids(plain.config)
        self.logits, self.wiring = logits_of(plain, ids), wiring(plain, ids[:1, :8])
        if hooked is not None:
            self._compare_logits(hooked, plain, ids)

    def _compare_logits(self, hooked: Any, plain: Any, ids: Ids) -> None:
        try:
            with torch.inference_mode():
                seen = list(differences(hooked, plain, ids))
        except Exception as error:
            self.decide("logits", False, f"the models do not run on the same tokens ({type(error).__name__}: {error})")
            return
        where = "; ".join(f"{name} {difference:.1e}" for name, difference in seen)
        self.decide(
            "logits",
            all(difference <= LOGITS_AGREE for _, difference in seen),
            f"largest difference between {type(hooked).__name__} and plain model, of the largest logit: {where} "
            f"(at most {LOGITS_AGREE:g})",
        )

    def _read_all(self, checkpoint: Checkpoint) -> int:
        for name in self.each(checkpoint.names(), "reading"):
            checkpoint.weight(name, device=self.device)
        return len(checkpoint.names())

    def _hooked(self, checkpoint: Checkpoint, wrapper: Wrapper) -> Any:
        try:
            model = load(checkpoint, wrapper=wrapper, device=self.device)
        except UnsupportedArchitectureError as error:
            self.checks.append(Check(f"{wrapper} model", "skipped", str(error)))
            return self._hooked(checkpoint, "bridge") if wrapper == "hooked" else None
        except Exception as error:
            kind = "" if isinstance(error, TracelensError) else f"{type(error).__name__}: "
            self.checks.append(Check(f"{wrapper} model", "failed", f"{kind}{error}"))
            return None
        self.decide(f"{wrapper} model", True, f"{type(model).__name__} takes every tensor, and none is missing")
        return model

    def _ids(self, config: Any) -> Ids:
        if self.tokens is not None:
            return self.tokens.to(self.device)
        config = config.get_text_config()
        length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (BATCH, length), generator=generator).to(self.device)

    def beside(self, checkpoint: Checkpoint, reference: Checkpoint) -> None:
        """The checks against the reference."""
        problems = list(_other_model(checkpoint, reference))
        self.decide("same model", not problems, "; ".join(problems) or "architecture, names, shapes and settings agree")
        plain = build_plain(reference, dtype=torch.float32, device=self.device)
        ids = self._ids(plain.config)
        runs = not problems and self.logits is not None and self.wiring is not None
        logits, before = (logits_of(plain, ids), wiring(plain, ids[:1, :8])) if runs else (None, UNKNOWN)
        del plain
        expected = Expectation(reference, checkpoint, before, (runs and self.wiring) or UNKNOWN, self.device)
        self.notes += expected.notes
        self._compare_weights(checkpoint, reference, expected)
        if runs and logits is not None and self.logits is not None:
            rounded = build_plain(Rounded(reference, checkpoint), dtype=torch.float32, device=self.device)
            self.function = function(logits, self.logits, logits_of(rounded, ids))
            self._function_check(self.function)

    def _compare_weights(self, checkpoint: Checkpoint, reference: Checkpoint, expected: Expectation) -> None:
        shared = [name for name in checkpoint.names() if name in reference]
        for name in self.each(shared, "comparing"):
            if checkpoint.shape(name) == reference.shape(name):
                try:
                    self.rows.append(_row(name, checkpoint, expected))
                except TracelensError as error:
                    scheme = checkpoint.quantized(name)
                    shown = str(scheme.scheme) if scheme else "plain"
                    self.rows.append(
                        TensorRow(name, shown, math.nan, math.nan, math.nan, math.nan, str(error), "wrong")
                    )
        self._tensors_check()

    def _tensors_check(self) -> None:
        wrong = [row.name for row in self.rows if row.severity == "wrong"]
        poor = [row.name for row in self.rows if row.severity == "poor"]
        ratios = [row.ratio for row in self.rows if row.scheme != "plain"]
        evidence = f"errors are up to {max(ratios, default=0.0):.2f} times those of rounding to nearest"
        if poor:
            evidence += f"; larger than the format explains: {shortened(poor)}"
        if wrong:
            evidence = f"not the reference's in that format: {shortened(wrong)}"
        self.decide("weights", not wrong, evidence)

    def _function_check(self, f: Function) -> None:
        self.decide(
            "function",
            f.ratio <= FUNCTION_WRONG,
            f"logits differ from the reference's by {f.error:.2g} of their size (rounding to nearest: "
            f"{f.error_rounding:.2g}), KL {f.kl:.2g} nats ({f.kl_rounding:.2g}), same top token after "
            f"{f.agreement:.0%} of tokens"
            + (f"; guessing costs {f.kl_uniform:.2g} nats: nothing of the function is left" if f.gone else ""),
        )

    def diagnosis(self, checkpoint: Checkpoint | None, referenced: bool) -> Diagnosis:
        return Diagnosis(
            source=self.source,
            format=checkpoint.format if checkpoint else "not readable",
            verdict=self._verdict(referenced),
            checks=tuple(self.checks),
            tensors=tuple(self.rows),
            function=self.function,
            notes=tuple(self.notes),
        )

    def _verdict(self, referenced: bool) -> Verdict:
        if any(check.outcome == "failed" for check in self.checks):
            return "wrong"
        if not referenced:
            return "no reference"
        poor = any(row.severity == "poor" for row in self.rows)
        f = self.function
        lost = f is not None and f.error > 0.01 and (f.ratio > FUNCTION_LIMIT or f.gone)
        return "degraded" if poor or lost else "verified"


def _contents(checkpoint: Checkpoint) -> str:
    quantized = sum(checkpoint.quantized(name) is not None for name in checkpoint.names())
    return f"{checkpoint.format}, {quantized} quantized and {len(checkpoint.names()) - quantized} other tensors"


def _row(name: str, checkpoint: Checkpoint, expected: Expectation) -> TensorRow:
    quantized = checkpoint.quantized(name)
    scheme = quantized.scheme if quantized else PLAIN
    found = expected.linear(checkpoint, name)
    # A norm with new factors is compared in what reads it.
    wanted = found if expected.compared_elsewhere(name) else expected.of(name)
    order = _group_order(checkpoint, quantized) if quantized else None
    result = compare(_matrix(wanted, order), _matrix(found, order), scheme)
    if norm := expected.unmatched(name, found, wanted):
        words = f"{norm} has new factors, and this weight, which reads it, does not have their inverses"
        result = replace(result, fault=words, severity="wrong")
    elif result.fault.startswith(UNRELATED) and (other := expected.resembles(name, found)):
        result = replace(result, fault=f"this is the reference's {other}")
    elif expected.moved(name) and result.ordinary and result.severity == "wrong":
        # A unit that its partner all but lost to rounding looks like one whose scale is off.
        words = f"{result.fault}; or lost by the weight that factors were moved to or from"
        result = replace(result, fault=words, severity="poor")
    return TensorRow(
        name=name,
        scheme=str(scheme) if quantized else "plain",
        relative_error=result.relative_error,
        yardstick=result.yardstick,
        ratio=result.ratio,
        worst_block=result.worst_block,
        fault=result.fault,
        severity=result.severity,
    )


def _matrix(tensor: Tensor, order: Tensor | None) -> Float[Tensor, "d_out d_in"]:
    """Rows of outputs, those of several experts one after the other; a vector is one row."""
    matrix = tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(0, -2)
    return matrix if order is None else matrix[:, order.to(matrix.device)]


def _group_order(checkpoint: Checkpoint, quantized: Quantized) -> Tensor | None:
    """The order that brings input columns of one group together, where an index says which group each is in."""
    index = next((part for part in quantized.parts if part.endswith("g_idx")), None)
    return None if index is None else checkpoint.stored.read(index).argsort(stable=True)


def _other_model(checkpoint: Checkpoint, reference: Checkpoint) -> Iterator[str]:
    """Reasons why the reference cannot be what was quantized."""
    if checkpoint.architecture != reference.architecture:
        yield f"it is a {checkpoint.architecture}, the reference a {reference.architecture}"
        return
    for key, older in SAME_MODEL.items():
        a, b = (_setting(c.config, (key, *older)) for c in (checkpoint, reference))
        same = a == b or (isinstance(a, float | int) and isinstance(b, float | int) and abs(a - b) <= 1e-6 * abs(b))
        if a is not None and b is not None and not same:
            yield f"{key} is {a}, the reference's {b}"
    ties = {name for name in ("lm_head.weight", "embed_out.weight") if reference.config.get("tie_word_embeddings")}
    ties |= {name for name in ("lm_head.weight", "embed_out.weight") if checkpoint.config.get("tie_word_embeddings")}
    here, there = set(checkpoint.names()) - ties, set(reference.names()) - ties
    if missing := sorted(there - here):
        yield f"tensors that only the reference has: {shortened(missing)}"
    # AutoGPTQ adds biases that do nothing.
    if extra := sorted(name for name in here - there if not _idle(checkpoint, name)):
        yield f"tensors that the reference lacks: {shortened(extra)}"
    for name in sorted(here & there):
        if checkpoint.shape(name) != reference.shape(name):
            yield f"{name} is {list(checkpoint.shape(name))}, the reference's {list(reference.shape(name))}"


def _idle(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".bias") and not bool(checkpoint.weight(name).any())


def _setting(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    rope = config.get("rope_parameters") or {}
    return next((place[key] for key in keys for place in (config, rope) if place.get(key) is not None), None)
