"""Whatever a caller may call a data set, as a `Dataset`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from tracelens.datasets.dataset import Dataset
from tracelens.datasets.files import Label, load_prompts
from tracelens.datasets.registry import get_dataset, list_datasets
from tracelens.errors import PromptError, UnknownNameError

_FILE = re.compile(r".*\.\w{1,6}")


def resolve_dataset(source: Any, *, baseline: Any = None, need_baseline: bool = True) -> Dataset:
    """A `Dataset` with safety and baseline prompts.

    Args:
        source: a registered name; a `Dataset`; the path of a `.jsonl` or `.csv` file; a mapping behaviour → prompts, in
            which `"baseline"` may hold the baseline; or a list of prompts. A prompt is a string, or an object with
            `.prompt` and, if it has them, `.behaviour` and `.category`. Strings in a list call for refusal.
        baseline: where the baseline prompts come from, instead of those of `source`. Any of the same: of a data set the
            baseline half is taken, a list of prompts or a file without labels is taken whole.
        need_baseline: whether there must be baseline prompts; an audit against a saved fingerprint does without.

    Raises:
        UnknownNameError: a name that is not registered.
        PromptError: no safety prompts, no baseline prompts, something that is no prompt, or a file that cannot be read.
    """
    if isinstance(source, Mapping) and "baseline" in source and baseline is None:
        source, baseline = {key: value for key, value in source.items() if key != "baseline"}, source["baseline"]
    dataset = _read(source, "safety")
    if baseline is not None:
        other = _read(baseline, "baseline")
        dataset = replace(
            dataset, baseline_prompts=other.baseline_prompts, baseline_categories=other.baseline_categories
        )
    if not dataset.safety_prompts:
        raise PromptError(
            f"data set {dataset.name!r} has no safety prompts; label some rows 'safety' or pass another set"
        )
    if need_baseline and not dataset.baseline_prompts:
        raise PromptError(
            f"data set {dataset.name!r} has no baseline prompts to compare with; pass baseline=[...], or "
            "baseline='harmful_refusal_v1' for those of a built-in set"
        )
    return dataset


def _read(source: Any, label: Label) -> Dataset:
    if isinstance(source, Dataset):
        return source
    if isinstance(source, str) and source in list_datasets():
        return get_dataset(source)
    if isinstance(source, PathLike) or (isinstance(source, str) and _FILE.fullmatch(source)):
        return load_prompts(source, label=label)
    if isinstance(source, str):
        unknown = UnknownNameError.of("data set", source, list_datasets())
        raise UnknownNameError(f"{unknown}. A file ends in .jsonl or .csv; prompts of your own go in a list")
    if isinstance(source, Mapping):
        return _collect({str(behaviour): prompts for behaviour, prompts in source.items()}, label)
    return _collect({"refusal" if label == "safety" else "baseline": source}, label)


def _collect(groups: Mapping[str, Any], label: Label) -> Dataset:
    """One half of a data set from group → prompts; the group is behaviour and category of prompts that name none."""
    rows = []
    for group, prompts in groups.items():
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise PromptError(f"{group} prompts: expected a list of prompts, got {prompts!r}")
        prompts = list(prompts)
        if not prompts:
            raise PromptError(f"{group} prompts: the list is empty; give it at least one prompt")
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else getattr(prompt, "prompt", None)
            if not isinstance(text, str):
                raise PromptError(f"{group} prompts: {prompt!r} is neither a string nor an object with .prompt")
            rows.append((text, getattr(prompt, "category", None) or group, getattr(prompt, "behaviour", None) or group))
    safety, baseline = (rows, []) if label == "safety" else ([], rows)
    return Dataset(
        name="prompts",
        description="Prompts given in memory.",
        safety_prompts=[text for text, _, _ in safety],
        baseline_prompts=[text for text, _, _ in baseline],
        safety_categories=[category for _, category, _ in safety],
        baseline_categories=[category for _, category, _ in baseline],
        behaviours=[behaviour for _, _, behaviour in safety],
    )
