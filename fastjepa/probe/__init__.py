"""What did the features learn? Classifiers on frozen features.

The trained encoder beside the same encoder untrained, raw pixels and chance. Videos are split into train, validation
(chooses between settings of the classifier) and test (is reported).
"""

from fastjepa.probe.baselines import Baselines
from fastjepa.probe.confusion import confusion_picture
from fastjepa.probe.features import MOST_VIDEOS, Cut, ProbeStopped
from fastjepa.probe.linear import linear_accuracy
from fastjepa.probe.probing import ATTENTIVE, KINDS, KNN, LINEAR, Protocol, probe
from fastjepa.probe.report import Accuracy, file_name, numbers, table, write
from fastjepa.probe.tokens import most_clips

__all__ = [
    "ATTENTIVE",
    "KINDS",
    "KNN",
    "LINEAR",
    "MOST_VIDEOS",
    "Accuracy",
    "Baselines",
    "Cut",
    "ProbeStopped",
    "Protocol",
    "confusion_picture",
    "file_name",
    "linear_accuracy",
    "most_clips",
    "numbers",
    "probe",
    "table",
    "write",
]
