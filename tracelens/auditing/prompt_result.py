"""`PromptLook`: both models of a pair on one prompt, with all that the prompt explorer shows. The definitions are those of an audit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from tracelens.auditing.evidence import Key
from tracelens.auditing.prompt_reading import PromptReading
from tracelens.organism.grammar import OrganismPrompt

if TYPE_CHECKING:
    import pandas as pd

Ended = Literal["end", "length", "context", "stopped"]
Ranking = Literal["answer", "prompt"]


@dataclass(frozen=True)
class Answer:
    """What a model says, the likeliest token each time.

    Attributes:
        text: without the token that ends it.
        ended: with the end token, at the number of tokens asked for, at the end of the context, or because it was stopped.
    """

    text: str
    tokens: tuple[str, ...]
    ended: Ended


@dataclass(frozen=True)
class Margin:
    """Log-odds of showing a behaviour over not showing it, at the first answer token, in nats (`behaviour.margin`)."""

    behaviour: str
    reference: float
    quantized: float

    @property
    def flipped(self) -> bool:
        """Whether the models decide differently."""
        return (self.reference > 0) != (self.quantized > 0)


@dataclass(frozen=True)
class NextToken:
    """A token that may begin the answer, and its probability in both models."""

    id: int
    text: str
    reference: float
    quantized: float


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """One feature on the prompt, token by token, in both models.

    Attributes:
        behaviours: those that it carries, if a fingerprint was given; empty for a capability feature.
    """

    site: str
    feature: int
    behaviours: tuple[str, ...]
    tokens: tuple[str, ...] = field(repr=False)
    reference: Float[np.ndarray, "token"] = field(repr=False)
    """Activations, 0 at BOS, which audits leave out."""
    quantized: Float[np.ndarray, "token"] = field(repr=False)

    @property
    def at_answer(self) -> float:
        """|r − q| at the prompt's last token, where the answer is decided."""
        return float(abs(self.reference[-1] - self.quantized[-1]))

    @property
    def over_prompt(self) -> float:
        """Σ over the tokens of |r − q|."""
        return float(np.abs(self.reference - self.quantized).sum())

    def moved(self, by: Ranking) -> float:
        return self.at_answer if by == "answer" else self.over_prompt


@dataclass(frozen=True, eq=False)
class PromptLook:
    """Reference and quantized model on one prompt.

    Attributes:
        reading: the prompt as the models read it.
        labels: names of the reference and of the quantized model.
        margins: of every behaviour whose first answer tokens are known.
        next_tokens: the likeliest of either model after the prompt, by the larger of the two probabilities.
        kl: KL(reference ‖ quantized) of the next token after each token, in nats, over the whole vocabulary; NaN at BOS.
        features: those that move most, at each site with an SAE: the first by `at_answer` and the first by `over_prompt`.
        n_moved: site → how many features move at all.
        patterns: attention of the reference and of the quantized model; None where it was not kept, which `notes` says.
        answers: "reference" and "quantized" → what they say; empty if none was asked for.
        organism: whether the models are builds of the embedded one.
        truth: of a prompt that the embedded model's grammar knows.
        notes: sentences about what is missing and why.
    """

    reading: PromptReading
    labels: tuple[str, str]
    margins: tuple[Margin, ...]
    next_tokens: tuple[NextToken, ...] = field(repr=False)
    kl: Float[np.ndarray, "token"] = field(repr=False)
    features: tuple[FeatureChange, ...] = field(repr=False)
    n_moved: Mapping[str, int] = field(repr=False)
    patterns: tuple[Float[np.ndarray, "layer head query key"], Float[np.ndarray, "layer head query key"]] | None = (
        field(repr=False)
    )
    answers: Mapping[str, Answer] = field(default_factory=dict)
    organism: bool = False
    truth: OrganismPrompt | None = None
    notes: tuple[str, ...] = ()

    @property
    def kl_answer(self) -> float:
        """KL at the answer position, nats."""
        return float(self.kl[-1])

    @property
    def kl_mean(self) -> float:
        """Mean KL over the prompt's tokens, nats."""
        return float(np.nanmean(self.kl))

    def margin(self, behaviour: str) -> Margin | None:
        return next((m for m in self.margins if m.behaviour == behaviour), None)

    def top_features(self, by: Ranking = "answer", *, site: str | None = None, k: int = 12) -> list[FeatureChange]:
        """The `k` features that move most, of one site or of all; features that do not move are not listed."""
        some = [change for change in self.features if site in (None, change.site) and change.moved(by) > 0]
        return sorted(some, key=lambda change: -change.moved(by))[:k]

    def feature(self, key: Key) -> FeatureChange | None:
        return next((change for change in self.features if (change.site, change.feature) == key), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; without the attention patterns."""
        truth = self.truth
        return {
            "text": self.reading.text,
            "prompt": self.reading.prompt,
            "tokens": list(self.reading.tokens),
            "labels": list(self.labels),
            "margins": {m.behaviour: asdict(m) | {"flipped": m.flipped} for m in self.margins},
            "next_tokens": [asdict(token) for token in self.next_tokens],
            "kl": [None if np.isnan(x) else float(x) for x in self.kl],
            "features": [
                {
                    **{name: getattr(change, name) for name in ("site", "feature", "at_answer", "over_prompt")},
                    "behaviours": list(change.behaviours),
                    "reference": change.reference.tolist(),
                    "quantized": change.quantized.tolist(),
                }
                for change in self.features
            ],
            "answers": {name: asdict(answer) for name, answer in self.answers.items()},
            "truth": truth and {"behaviour": truth.behaviour, "z": truth.z, "answer": truth.answer},
            "notes": list(self.notes),
        }

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per feature of `features`."""
        import pandas as pd

        columns = ("site", "feature", "behaviours", "at_answer", "over_prompt")
        rows = [[getattr(change, name) for name in columns] for change in self.features]
        return pd.DataFrame(rows, columns=pd.Index(columns))
