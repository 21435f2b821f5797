"""sacreBLEU (Post 2018): BLEU (Papineni et al. 2002) and chrF (Popović 2015) of detokenized text, with signatures.

The bootstrap is sacreBLEU's own: 1,000 resamples of the sentences, seed 12345.
"""

from __future__ import annotations

from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

_RESAMPLES = 1000


def score(hypotheses: list[str], references: list[str], interval: bool = False) -> dict[str, Any]:
    """``bleu`` and ``chrf`` (0 to 100), ``bleu_signature`` and ``chrf_signature``; with ``interval`` also ``bleu_low``
    and ``bleu_high``, the 95 % bootstrap interval. ``ValueError`` for no sentence or sides of unequal length.
    """
    _check(hypotheses, references)
    bleu, chrf = BLEU(), CHRF()
    found = bleu.corpus_score(hypotheses, [references], n_bootstrap=_RESAMPLES if interval else 1)
    scores = {"bleu": found.score, "chrf": chrf.corpus_score(hypotheses, [references]).score}
    if interval:
        scores |= {"bleu_low": found._mean - found._ci, "bleu_high": found._mean + found._ci}
    return scores | {"bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature())}


def paired(first: list[str], second: list[str], references: list[str]) -> dict[str, dict[str, Any]]:
    """Are two systems different? Paired bootstrap (Koehn 2004) on the same sentences, for ``bleu`` and ``chrf``: each
    ``first`` and ``second`` (scores), ``first_interval`` and ``second_interval`` (half of the 95 % interval's width),
    ``p`` (of so large a difference, were there none) and ``signature``.

    sacreBLEU calls the difference of a system from itself significant (its p counts strictly larger ones); here p is 1.
    """
    _check(first, references)
    _check(second, references)
    metrics = {"bleu": BLEU(references=[references]), "chrf": CHRF(references=[references])}
    test = PairedTest([("first", first), ("second", second)], metrics, None, "bs", _RESAMPLES)
    signatures, results = test()
    found = {}
    for name, (metric, signature) in zip(metrics, signatures.items(), strict=True):
        one, other = results[metric]
        assert not isinstance(one, str) and not isinstance(other, str)
        found[name] = {
            "first": one.score, "first_interval": one.ci, "second": other.score, "second_interval": other.ci,
            "p": 1.0 if first == second else other.p_value, "signature": str(signature),
        }  # fmt: skip
    return found


def _check(hypotheses: list[str], references: list[str]) -> None:
    if not references or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references: "
                         "there must be as many, and at least one")  # fmt: skip
