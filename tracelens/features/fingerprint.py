"""Fingerprints: which features of a model's SAEs carry which behaviour."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tracelens.chat import Chat, as_chat
from tracelens.errors import ResultFileError, SAEError, UnknownNameError
from tracelens.features.maxima import Maxima, PromptMaxima
from tracelens.features.saes import SAEs, check_saes, encode, normalise_saes, sae_hash
from tracelens.features.selection import FingerprintFeature, check_prompts, select_features
from tracelens.pair import stream_aligned
from tracelens.sites import Site

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """Features that carry a behaviour, with what they were found on.

    Attributes:
        features: highest held-out AUROC first.
        model: the reference's name.
        saes: SHA-256 of each SAE's tensors, by site.
        n_prompts: distinct prompts per behaviour.
        n_baseline: distinct baseline prompts.
        settings: what `select_features` was given.
    """

    features: list[FingerprintFeature]
    model: str
    saes: dict[Site, str]
    n_prompts: dict[str, int]
    n_baseline: int
    settings: dict[str, float]

    @classmethod
    def from_maxima(
        cls,
        maxima: Mapping[Site, Maxima | Float[Tensor, "prompt _feature"]],
        labels: Sequence[str | None],
        *,
        ids: Sequence[str],
        model: str,
        saes: SAEs,
        min_auroc: float = 0.9,
        alpha: float = 0.05,
        n_permutations: int = 1000,
        seed: int = 0,
        split: float = 0.5,
    ) -> "Fingerprint":
        """The fingerprint of prompt maxima that were collected elsewhere; see `select_features`."""
        settings = {"min_auroc": min_auroc, "alpha": alpha, "split": split}
        counts = {"n_permutations": n_permutations, "seed": seed}
        baseline, sides = check_prompts(labels, ids)
        return cls(
            features=select_features(maxima, labels, ids=ids, **settings, **counts),
            model=model,
            saes={site: sae_hash(sae) for site, sae in saes.items()},
            n_prompts={name: len(rows) for name, rows in sides.items()},
            n_baseline=len(baseline),
            settings=settings | counts,
        )

    @property
    def by_behaviour(self) -> dict[str, list[FingerprintFeature]]:
        """Features of each behaviour, those found for several under each of them."""
        return {name: [row for row in self.features if name in row.behaviours] for name in self.n_prompts}

    def mask(self, site: Site, d_sae: int, behaviour: str | None = None) -> Bool[Tensor, "feature"]:
        """True at the features of a site that are in the fingerprint, or that carry one behaviour.

        Raises `UnknownNameError` for a site or behaviour that the fingerprint does not cover, `SAEError` if `d_sae` is
        too small.
        """
        if site not in self.saes:
            raise UnknownNameError.of("site of this fingerprint", site, self.saes)
        if behaviour is not None and behaviour not in self.by_behaviour:
            raise UnknownNameError.of("behaviour", behaviour, self.by_behaviour)
        rows = self.features if behaviour is None else self.by_behaviour[behaviour]
        indices = [row.feature for row in rows if row.site == site]
        if indices and max(indices) >= d_sae:
            raise SAEError(f"the fingerprint holds feature {max(indices)} at {site}, but the SAE has only {d_sae}")
        mask = torch.zeros(d_sae, dtype=torch.bool)
        mask[indices] = True
        return mask

    def check(self, saes: SAEs) -> None:
        """Raises `SAEError`, listing the sites, unless these are the SAEs that the fingerprint was made with."""
        wrong = [
            f"{site}: {'another SAE' if site in saes else 'no SAE given'}"
            for site, known in self.saes.items()
            if site not in saes or sae_hash(saes[site]) != known
        ]
        if wrong:
            raise SAEError(
                "the fingerprint was made with other SAEs; load those or make a new one:\n  " + "\n  ".join(wrong)
            )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per feature; `site` as hook name, `behaviours` joined by commas."""
        import pandas as pd

        rows = [asdict(row) | {"site": str(row.site), "behaviours": ", ".join(row.behaviours)} for row in self.features]
        return pd.DataFrame(rows, columns=[field.name for field in fields(FingerprintFeature)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "tracelens_fingerprint": VERSION,
            "model": self.model,
            "saes": {str(site): known for site, known in self.saes.items()},
            "n_prompts": self.n_prompts,
            "n_baseline": self.n_baseline,
            "settings": self.settings,
            "features": [asdict(row) | {"site": str(row.site)} for row in self.features],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Fingerprint":
        """What `to_dict` gave; raises `ResultFileError` for another version, `KeyError` or `TypeError` for something else."""
        version = data["tracelens_fingerprint"]
        if version != VERSION:
            raise ResultFileError(f"a fingerprint of version {version}; this Tracelens reads {VERSION}")
        return cls(
            features=[FingerprintFeature(**row | {"site": Site.parse(row["site"])}) for row in data["features"]],
            model=data["model"],
            saes={Site.parse(name): known for name, known in data["saes"].items()},
            n_prompts=data["n_prompts"],
            n_baseline=data["n_baseline"],
            settings=data["settings"],
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Fingerprint":
        """Reads what `save` wrote; raises `ResultFileError` for anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = error if isinstance(error, ResultFileError) else repr(error)
            raise ResultFileError(f"{path} is not a fingerprint that Fingerprint.save wrote: {cause}") from error


class CircuitTracer:
    """Finds the features of a model that carry its behaviours.

    Args:
        model: a hooked model, the reference.
        sae_dict: its SAEs, as `normalise_saes` takes them.
        tokenizer: the model's own by default.

    Raises `SAEError` if an SAE does not fit the model.
    """

    def __init__(self, model: Any, sae_dict: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.saes = normalise_saes(sae_dict)
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        check_saes(self.saes, model)

    def create_fingerprint(
        self,
        safety_prompts: Mapping[str, Sequence[Any]],
        baseline_prompts: Sequence[Any],
        *,
        min_auroc: float = 0.9,
        alpha: float = 0.05,
        n_permutations: int = 1000,
        seed: int = 0,
        split: float = 0.5,
        chat: Chat = "auto",
        batch_size: int = 32,
        progress: bool = False,
    ) -> Fingerprint:
        """Runs the model once over all prompts and keeps the features that tell them apart: see `select_features`.

        Args:
            safety_prompts: prompts (texts, or objects with `.prompt`) by behaviour.
            baseline_prompts: prompts that call for none of the behaviours, alike otherwise.
            chat: whether prompts are put into the tokenizer's chat template; see `tracelens.chat.as_chat`.

        Raises `PromptError` for too few prompts, or prompts that the model cannot take.
        """
        labels = [name for name, prompts in safety_prompts.items() for _ in prompts] + [None] * len(baseline_prompts)
        prompts = [prompt for prompts in (*safety_prompts.values(), baseline_prompts) for prompt in prompts]
        ids = as_chat(prompts, self.tokenizer, chat)
        check_prompts(labels, ids)  # before the model runs
        maxima = self._maxima(ids, batch_size, progress)
        return Fingerprint.from_maxima(
            maxima,
            labels,
            ids=ids,
            model=str(getattr(self.model.cfg, "model_name", type(self.model).__name__)),
            saes=self.saes,
            min_auroc=min_auroc,
            alpha=alpha,
            n_permutations=n_permutations,
            seed=seed,
            split=split,
        )

    def _maxima(self, prompts: list[str], batch_size: int, progress: bool) -> Mapping[Site, Maxima]:
        distinct = list(dict.fromkeys(prompts))
        row = {text: i for i, text in enumerate(distinct)}
        maxima = PromptMaxima(len(distinct))
        for batch in stream_aligned(
            {"reference": self.model},
            distinct,
            sites=list(self.saes),
            tokenizer=self.tokenizer,
            batch_size=batch_size,
            logits=False,
            progress=progress,
        ):
            for site, sae in self.saes.items():
                maxima.update(site, encode(sae, batch.activations["reference"][site]), batch.prompt)
        rows = torch.tensor([row[text] for text in prompts])
        return {site: values.prompts(rows) for site, values in maxima.finalize().items()}
