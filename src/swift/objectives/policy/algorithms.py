"""The table of policy optimisation algorithms. One algorithm is one row; DAPO is eight lines.

A row names an estimator of advantages, the level of the importance ratio, a surrogate, the weight against the
mismatch of sampler and trainer, a KL estimator and an aggregation, with the knobs of its paper. ``sampling`` holds
what the paper asks of the loop around the loss.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from swift.core.errors import ConfigError
from swift.core.user_code import load_file
from swift.objectives.knobs import check_knobs, knobs_of, lookup

__all__ = ["ALGORITHMS", "LOSS_TYPES", "Algorithm", "find_algorithm", "with_knobs"]


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        paper: arXiv id.
        advantage: see ``estimators.py``.
        ratio: token, sequence or sequence_token.
        surrogate: a name of ``surrogates.py``, or a function like those.
        aggregation: see ``loss.py``.
        mismatch: a name of ``corrections.py``, or "none".
        kl: a name of ``divergence.py``.
        beta: weight of the KL to the reference; 0: no reference.
        kl_in_reward: the KL is part of the reward, not of the loss.
        knobs: of surrogate, mismatch weight and masks.
        sampling: what the loop around the loss does.
    """

    paper: str = ""
    advantage: str = "grpo"
    ratio: str = "token"
    surrogate: str | Callable[..., Any] = "clip"
    aggregation: str = "sequence_mean"
    mismatch: str = "none"
    kl: str = "ratio_k3"
    beta: float = 0.0
    kl_in_reward: bool = False
    knobs: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


_DAPO = Algorithm(
    "2503.14476",
    aggregation="token_mean",
    knobs={"epsilon": 0.2, "epsilon_high": 0.28},
    sampling={"dynamic_sample": True, "overlong_filter": True, "soft_overlong": True},
)
_GSPO = Algorithm(
    "2507.18071",
    ratio="sequence",
    knobs={"epsilon": 3e-4, "epsilon_high": 4e-4},
    sampling={"steps_per_generation": 4},
)

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm("2402.03300", knobs={"epsilon": 0.2}, beta=0.04),
    "dr_grpo": Algorithm(
        "2503.20783", advantage="dr_grpo", aggregation="constant_length", knobs={"epsilon": 0.2}
    ),
    "bnpo": Algorithm("2506.02864", aggregation="micro_batch_mean", knobs={"epsilon": 0.2}),
    "dapo": _DAPO,
    "gspo": _GSPO,
    "gspo_token": replace(_GSPO, ratio="sequence_token"),
    "cispo": Algorithm("2506.13585", surrogate="cispo", aggregation="token_mean", knobs={"cap": 5.0}),
    "sapo": Algorithm("2511.20347", surrogate="sapo", knobs={"tau_pos": 1.0, "tau_neg": 1.05}),
    "rloo": Algorithm(
        "2402.14740",
        advantage="rloo",
        aggregation="sequence_sum",  # the gradient of the sequence's log-probability, not of a mean
        kl="k1",
        beta=0.05,
        kl_in_reward=True,
        knobs={"epsilon": 0.2},
    ),
    "reinforce_pp": Algorithm(
        "2501.03262",
        advantage="reinforce_pp",
        aggregation="token_mean",
        kl="k1",
        beta=0.01,
        kl_in_reward=True,
        knobs={"epsilon": 0.2},
    ),
    "reinforce_pp_baseline": Algorithm(
        "2501.03262",
        advantage="reinforce_pp_baseline",
        aggregation="token_mean",
        kl="k2",
        beta=0.01,
        knobs={"epsilon": 0.2},
    ),
    "gmpo": Algorithm("2507.20673", surrogate="gmpo", knobs={"epsilon": 0.4}),
    "dppo": Algorithm(
        "2602.04879",
        surrogate="dppo",
        aggregation="token_mean",
        knobs={"delta_low": 0.15, "delta_high": 0.15, "ratio_cap": 20.0},
    ),
    "prime_rl": Algorithm(
        "2602.04879",
        advantage="dr_grpo",
        surrogate="prime_rl",
        aggregation="token_mean",
        knobs={"delta_low": 0.2, "delta_high": 0.2, "kl_tau": 1e-3},
    ),
    "vespo": Algorithm(
        "2602.10693",
        surrogate="vespo",
        aggregation="token_mean",
        knobs={"k_pos": 2.0, "lam_pos": 3.0, "k_neg": 3.0, "lam_neg": 2.0},
    ),
    "real": Algorithm(
        "2602.05630",
        advantage="dr_grpo",
        surrogate="real",
        aggregation="group_mean",
        knobs={"real_tau": 0.5},
    ),
    "fipo": replace(_DAPO, paper="2603.19835", surrogate="fipo"),
    "opo": Algorithm("2505.23585", advantage="opo", surrogate="ratio", aggregation="sequence_sum"),
    "gdpo": Algorithm("2601.05242", advantage="gdpo", knobs={"epsilon": 0.2}),
    "maxrl": Algorithm("2602.02710", advantage="maxrl", surrogate="ratio", aggregation="sequence_sum"),
    "luspo": replace(_GSPO, paper="2602.05261", aggregation="sequence_sum"),
    "chord": Algorithm(
        "2508.11408",
        knobs={"epsilon": 0.2},
        sampling={"chord_mu_peak": 0.9, "chord_mu_valley": 0.05, "chord_enable_phi_function": True},
    ),
    "reinforce_mean": Algorithm(
        "Williams 1992", advantage="reinforce_mean", surrogate="ratio", aggregation="token_mean"
    ),
}

LOSS_TYPES: dict[str, dict[str, str]] = {
    "grpo": {"surrogate": "clip", "aggregation": "sequence_mean"},
    "bnpo": {"surrogate": "clip", "aggregation": "micro_batch_mean"},
    "dr_grpo": {"surrogate": "clip", "aggregation": "constant_length"},
    "dapo": {"surrogate": "clip", "aggregation": "token_mean"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    "vespo": {"surrogate": "vespo", "aggregation": "token_mean"},
    "luspo": {"surrogate": "clip", "aggregation": "sequence_sum"},
    "real": {"surrogate": "real", "aggregation": "group_mean"},
    "fipo": {"surrogate": "fipo", "aggregation": "token_mean"},
}
"""``loss_type`` of ms-swift and TRL: a surrogate and an aggregation."""

_FIELDS = {one.name for one in fields(Algorithm)} - {"paper", "knobs", "sampling"}
_SPELLINGS = {
    "importance_sampling_level": "ratio",
    "advantage_estimator": "advantage",
    "kl_estimator": "kl",
    "off_policy_sequence_mask_delta": "opsm_delta",
}
_MASKS = ("opsm_delta", "top_entropy_quantile", "entropy_threshold")


def find_algorithm(algo: str | Algorithm) -> Algorithm:
    """A row by name, or a user's own: ``FILE.py:ROW``, or a dotted path (``package.module.ROW``, also of a module in
    the current folder).

    Raises ConfigError with the nearest name; or when the path leads to no row.
    """
    if isinstance(algo, Algorithm):
        return algo
    if algo in ALGORITHMS or not ("." in algo or ":" in algo):
        return lookup(ALGORITHMS, algo, "algorithm")
    try:
        if ".py:" in algo:
            file, _, name = algo.rpartition(":")
            row = getattr(load_file(file, "algorithm", where="--algo"), name)
        else:
            module, _, name = algo.replace(":", ".").rpartition(".")
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            row = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"there is no algorithm at {algo!r}", why=str(error)) from error
    if not isinstance(row, Algorithm):
        raise ConfigError(
            f"{algo} is {type(row).__name__}, not a row of the table",
            fix=f"{name} = swift.objectives.policy.algorithms.Algorithm(...)",
        )
    return row


def with_knobs(algo: str | Algorithm, knobs: Mapping[str, Any]) -> Algorithm:
    """The row with some of its parts and knobs replaced. ms-swift's spellings are taken as well.

    Knobs that the row brings for a surrogate it no longer has fall away; those given must have an effect.
    Raises ConfigError for unknown ones.
    """
    from swift.objectives.policy.corrections import MISMATCH_WEIGHTS
    from swift.objectives.policy.surrogates import SURROGATES

    row = find_algorithm(algo)
    parts: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if "loss_type" in knobs:
        parts.update(lookup(LOSS_TYPES, knobs["loss_type"], "loss_type"))
    for spelled, value in knobs.items():
        name = _SPELLINGS.get(spelled, spelled)
        if name in _FIELDS:
            parts[name] = value
        elif name != "loss_type":
            given[name] = value
    row = replace(row, **parts)
    surrogate = surrogate_of(row)
    taken = knobs_of(surrogate)
    if "cap" in taken and "epsilon_high" in given:  # what TRL and ms-swift call the cap of CISPO
        given["cap"] = given.pop("epsilon_high")
    allowed = {*taken, *_MASKS, *(knobs_of(MISMATCH_WEIGHTS[row.mismatch]) if row.mismatch != "none" else ())}
    functions = {**SURROGATES, **{f"mismatch {name}": one for name, one in MISMATCH_WEIGHTS.items()}}
    owner = algo if isinstance(algo, str) else "this algorithm"
    elsewhere = {name: knobs_of(function) for name, function in functions.items()}
    check_knobs(given, allowed | _FIELDS, owner, elsewhere)
    kept = {name: value for name, value in row.knobs.items() if name in allowed}
    return replace(row, knobs={**kept, **given})


def surrogate_of(row: Algorithm) -> Callable[..., Any]:
    """The function. Raises ConfigError for unknown parts of the row."""
    from swift.objectives.policy.corrections import MISMATCH_WEIGHTS
    from swift.objectives.policy.surrogates import SURROGATES

    if row.mismatch != "none":
        lookup(MISMATCH_WEIGHTS, row.mismatch, "mismatch weight")
    return lookup(SURROGATES, row.surrogate, "surrogate") if isinstance(row.surrogate, str) else row.surrogate
