"""Diagnosis of anybody's VAE: is it balanced, and which gamma does a loss imply?"""

from vaebal.diagnosis.certificate import Certificate, diagnose
from vaebal.diagnosis.dimension import Dimension, data_dimension, maximum_likelihood, two_nn
from vaebal.diagnosis.evidence import Evidence
from vaebal.diagnosis.implied import implied_beta, implied_gamma

__all__ = [
    "Certificate",
    "Dimension",
    "Evidence",
    "data_dimension",
    "diagnose",
    "implied_beta",
    "implied_gamma",
    "maximum_likelihood",
    "two_nn",
]
