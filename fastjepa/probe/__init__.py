"""What did the features learn? Classifiers on frozen features.

The trained target encoder beside the same encoder untrained, raw pixels and chance. Videos are split into train,
validation (chooses between settings of the classifier) and test (is reported).
"""

from fastjepa.probe.features import Cut, ProbeStopped
from fastjepa.probe.linear import linear_accuracy, probe
from fastjepa.probe.report import Accuracy, table, write

__all__ = ["Accuracy", "Cut", "ProbeStopped", "linear_accuracy", "probe", "table", "write"]
