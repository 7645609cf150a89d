"""`AuditSettings`: how an audit measures."""

from dataclasses import dataclass

from tracelens.chat import Chat
from tracelens.errors import MetricInputError
from tracelens.features.survival import MEMORY, N_BLOCKS
from tracelens.pair import PaddingSide


@dataclass(frozen=True)
class AuditSettings:
    """How an audit measures; what is not said here follows from the models, SAEs and prompts.

    Attributes:
        min_active: tokens on which the reference must fire a feature for it to count as live.
        degradation_threshold: fidelity below which a feature is called degraded.
        smearing_tau, smearing_delta: a pair is smeared if its cosine reaches tau and rose by at least delta.
        min_auroc, alpha: what a feature must show on held-out prompts to be a safety feature.
        survived_at, damaged_at: Pearson correlation from which a feature has survived, and below which it is damaged.
        controls: whether the bf16 floor, matched noise and permuted error are measured too; they cost a pass of the model each.
        noise_seeds: draws of matched noise; nothing can be told from the noise of a single one, and little from three: what one more
            draw would give reaches 8.8 of their standard deviations to either side with 3 draws, 4.3 with 5, and 3.3 with 8.
        permuted_seeds: shuffles of the true error within its rows. One will do, because the draws of noise tell how much it varies.
        n_resamples: bootstrap resamples.
        n_blocks: groups of prompts that the bootstrap draws; with fewer prompts each is a group of its own.
        seed: of bootstrap, permutations and noise.
        chat: "auto" puts bare requests into the tokenizer's chat template, if it has one; "always", "never".
        batch_size: prompts per forward pass.
        padding_side: of prompts in a batch. The numbers depend neither on it nor on `batch_size`, bar the last bits; rounding of
            activations makes a whole step of these where a value lies between two, and single features then differ visibly.
        memory: GB of the reference's pass and of sums that are kept in memory; what is more goes to disk.
        evidence_prompts: prompts whose activations are kept token by token (`AuditReport.evidence`), a random sample if there are more;
            0 for none. An eighth of `memory` bounds them too: what does not fit is not kept, and the evidence says how many were.
        evidence_features: features that are described there; safety features all are, even if there are more.
        progress: progress bars.

    Raises `MetricInputError` for a number that is too small, and for `damaged_at` above `survived_at`.
    """

    min_active: int = 10
    degradation_threshold: float = 0.8
    survived_at: float = 0.9
    damaged_at: float = 0.5
    smearing_tau: float = 0.5
    smearing_delta: float = 0.2
    min_auroc: float = 0.9
    alpha: float = 0.05
    controls: bool = True
    noise_seeds: int = 5
    permuted_seeds: int = 1
    n_resamples: int = 1000
    n_blocks: int = N_BLOCKS
    seed: int = 0
    chat: Chat = "auto"
    batch_size: int = 32
    padding_side: PaddingSide | None = None
    memory: float = MEMORY
    evidence_prompts: int = 512
    evidence_features: int = 1000
    progress: bool = False

    def __post_init__(self) -> None:
        least = {"noise_seeds": 0, "permuted_seeds": 0, "n_resamples": 1, "n_blocks": 8, "batch_size": 1}
        least |= {"evidence_prompts": 0, "evidence_features": 0}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                raise MetricInputError(f"{name} is {value}; it must be at least {smallest}")
        if not self.damaged_at <= self.survived_at:
            raise MetricInputError(
                f"damaged_at is {self.damaged_at} and survived_at {self.survived_at}; expected damaged_at ≤ survived_at"
            )
