"""Signs of gradient masking: does a gradient attack measure this network's robustness, or its own failure?"""

from softdefend.evaluation.masking.finding import Audit, Finding
from softdefend.evaluation.masking.run import CHECKS, audit

__all__ = ["CHECKS", "Audit", "Finding", "audit"]
