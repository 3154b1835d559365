"""What did the features learn? Classifiers on frozen features.

The trained target encoder beside the same encoder untrained, raw pixels and chance. Videos are split into train,
validation (chooses between settings of the classifier) and test (is reported).
"""

from fastjepa.probe.attentive import attentive_probe
from fastjepa.probe.features import MOST_VIDEOS, Cut, ProbeStopped
from fastjepa.probe.linear import linear_accuracy, probe
from fastjepa.probe.report import Accuracy, table, write
from fastjepa.probe.tokens import most_clips

__all__ = [
    "MOST_VIDEOS",
    "Accuracy",
    "Cut",
    "ProbeStopped",
    "attentive_probe",
    "linear_accuracy",
    "most_clips",
    "probe",
    "table",
    "write",
]
