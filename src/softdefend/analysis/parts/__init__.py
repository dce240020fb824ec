"""The parts of an analysis, one file each; each registers its part."""

from softdefend.analysis.parts import geometry, gradients, information, labels, overfitting

__all__ = ["geometry", "gradients", "information", "labels", "overfitting"]
