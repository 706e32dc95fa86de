"""How the numbers of the report were made, in words."""

from __future__ import annotations

from dip_hf.evaluation.calibration import BINS
from studies.compare import LEVEL, MIN_SEEDS, UNANIMOUS
from studies.statistics import RESAMPLES


def method_section() -> str:
    """The report's first section, Markdown."""
    return "\n\n".join(["## How to read this", _CELLS, _DIFFERENCES, _VERDICTS, _CALIBRATION, _REST])


_CELLS = (
    "A cell is an arm, a data size and a seed. The seed draws the training examples, the initialisation and the "
    "order of the data, alike for all arms. Every arm that chooses between settings has the same number of trials; "
    "one that starts from what another arm's trials chose has had those too. The setting with the highest "
    "teacher-forced exact match on the validation split (ties: lowest negative log-likelihood), averaged over the "
    "selection seeds, is run with all seeds, and each of these runs is scored once on the test split, but for a "
    "study of settings, which says so. The test items of a task set are the same in every study, or its first ones."
)
_DIFFERENCES = (
    "Accuracy is the share of generated answers that reasoning-gym's own scorer gives full marks, the mean over "
    "families; ± is the standard deviation over seeds. A difference is to the reference arm with the same seeds and "
    f"items. Its 95% basic interval comes from {RESAMPLES:,} two-way bootstrap resamples, reflected about the "
    "difference at hand: seeds are drawn with replacement, and independently, within each family, items, the same "
    "for all seeds; an arm's score always comes with the reference's. With five seeds such an interval is too short "
    "where seeds are most of what varies (were they all, it would cover 85%), and too long where they are little of "
    "it, as in accuracy here. With one seed it covers the choice of items alone."
)
_VERDICTS = (
    "p is the larger one of the bootstrap's and a paired t-test's over seeds, without which a table of many arms "
    "with five seeds would often show some difference where there is none. It is corrected by Holm over the arms of "
    f"a table, of which those that are not finished count with p = 1. A verdict takes p < {LEVEL:g} after that, all "
    f"of the study's seeds, at least {MIN_SEEDS}, so that none is left out whose training diverged, and, of "
    f"{UNANIMOUS} seeds or fewer, the same sign in each. Above each table stands the true difference that it would "
    "show four times of five: by the t-test, for an arm of median spread that alone differs from the reference. "
    "Where less than that is not shown, it may still be there."
)
_CALIBRATION = (
    f"NLL is that of the reference answer with its end (a palindrome may have several right ones). ECE has {BINS} "
    "bins of equal width. That of a finite sample is too high, most for a well calibrated arm: beside it stands "
    "what chance alone gives a perfectly calibrated one with the same confidences (the mean of 200 draws). "
    "Differences to such an arm are too small, for which the basic interval corrects in part. Confidence (that in "
    "the model's own answer), its Brier score and AUROC (right against wrong answers) have no interval."
)
_REST = (
    "Robustness, smoothness and reconstruction are teacher-forced and of one noise-free pass, so that they leave "
    "out arms that predict by samples, an ensemble or at a temperature; they have no interval. Training time is "
    "measured with other runs at work beside it, and not always on the same machine, so its ratio, a median over "
    "seeds, is rough."
)
