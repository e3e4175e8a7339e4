"""Objectives: how a batch becomes a loss. One small file each; `term` holds what they share.

    term       Term(name, sum, weight, coefficient), the protocol
    causal     predict the next token
"""

from threefold.objectives.causal import Causal
from threefold.objectives.term import Objective, Term

OBJECTIVES: dict[str, type[Causal]] = {"causal": Causal}

__all__ = ["OBJECTIVES", "Causal", "Objective", "Term"]
