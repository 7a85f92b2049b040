"""Table I of Teerapittayanon, McDanel and Kung 2016 (arXiv:1709.01686).

The paper times the trunk segment of each stage only, without branch layers, softmax, entropy and the copying of the
remaining samples. It sweeps thresholds on the test set.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """Both rows of one network; accuracies are fractions, times are milliseconds per sample at batch 1."""

    plain_accuracy: float
    accuracy: float
    cpu_ms_plain: float
    cpu_ms: float
    gpu_ms_plain: float
    gpu_ms: float
    thresholds: tuple[float, ...]
    exit_share: tuple[float, ...]


TABLE_1 = {
    "b_lenet": Reported(0.9920, 0.9925, 3.37, 0.62, 1.58, 0.34, (0.025,), (0.943, 0.0563)),
    "b_alexnet": Reported(0.7838, 0.7919, 9.56, 6.32, 3.15, 1.30, (0.0001, 0.05), (0.656, 0.252, 0.092)),
    "b_resnet110": Reported(0.8070, 0.7917, 137.2, 73.5, 70.9, 37.2, (0.3, 0.2), (0.415, 0.138, 0.447)),
}
