"""What the words on the page of an audit mean."""

DEFINITIONS = {
    "fidelity": "Of one feature, over the tokens of all prompts: Σrq / max(Σr², Σq²), where r and q are its activations in the "
    "reference and in the quantized model. Between 0 and 1; 1 only if nothing changed. “Degraded by 20 %” is a fidelity of 0.80.",
    "fidelity under noise": "The same feature's fidelity where matched noise stands in place of the quantization error, mean over draws.",
    "CPFR": "Circuit-preserving feature ratio: the mean fidelity of a set of live features, those that the reference fires on "
    "at least {min_active} tokens.",
    "degraded": "A feature with a fidelity below {degradation_threshold}.",
    "worst first": "By the share that is lost (1 − fidelity, or the rise of a pair's cosine) less what could be chance: the lower end "
    "of its 95 % Wilson interval over the tokens on which the feature, or the rarer one of the pair, fires.",
    "muting rate": "Share of the tokens on which the reference fires a feature and the quantized model does not. Muted: at least 0.9. "
    "Its interval on this page is Wilson's over those tokens; tokens of one prompt are alike, so it is rather too narrow.",
    "novelty": "Share of the tokens on which the quantized model fires a feature and the reference does not.",
    "correlation, drift, retention": "Pearson correlation of r and q; ‖r − q‖ / ‖r‖; Σq / Σr.",
    "survived, blurred, damaged": "A correlation of at least {survived_at}; between; below {damaged_at}.",
    "p and q of a shift": "Whether a feature's mean activation shifted at all: the p of a sign-flip permutation over blocks of prompts, "
    "and q, the same adjusted over all live features (Benjamini–Hochberg). Rounding shifts most features; whether that is more than "
    "noise does is what the verdict is about.",
    "smeared pair": "Two features whose activations' cosine over tokens rises by at least {smearing_delta}, to at least "
    "{smearing_tau}: the quantized model tells them apart less well. They merge on tokens on which the reference fires one of them "
    "at most, and the quantized model both.",
    "flip": "A prompt that the two models decide differently: the margin, log-odds of showing the behaviour at the first answer "
    "token in nats, changes its sign.",
    "KL divergence": "KL(reference ‖ quantized) over the vocabulary, in nats, mean over tokens. Perplexity is exp(mean NLL).",
    "promoted and suppressed tokens": "Those whose logits a feature's decoder direction raises or lowers most, per unit of activation.",
    "nearest features": "The features of the same SAE whose decoder directions have the largest cosine with this one's.",
    "recovery": "Of what quantization moved the margin, the share that keeping some matrices in 16 bit brings back: "
    "Σ n d / Σ d² over prompts, with n = margin − that of the quantized model and d = that of the reference − that of the "
    "quantized model. 0 is the quantized model, 1 the reference.",
    "bf16 floor": "The reference computed in bf16 in place of its own precision: what harmless rounding does.",
    "matched noise": "The reference with Gaussian noise in place of each tensor's quantization error, of the same norm: what a typical "
    "draw does, and the interval in which one more draw would be.",
    "permuted error": "The reference with its own quantization error, shuffled within the rows of each tensor; likewise.",
    "random features": "Sets of capability features with the safety features' sites and firing rates, drawn at random.",
    "permuted labels": "The features that the search for safety features puts first when the prompts' labels are shuffled, as many at "
    "each site as there are safety features.",
    "worse than noise of the same size, like noise, better than noise": "Whether the safety features' CPFR is outside of where one more "
    "draw of noise would be, at 5 % for the three comparisons with random error together. Like noise: no difference could be told; the "
    "interval says how large a difference there may be.",
    "intervals": "95 %. Over prompts by the paired bootstrap; Wilson's for rates; for random errors over prompts and draws. Of a single "
    "feature over prompts if it fires in at least two groups of them. Beside its fidelity under noise a card has the least and the largest "
    "of the draws, which is no 95 % interval.",
}
"""Word → its definition, filled in from a report's settings."""
