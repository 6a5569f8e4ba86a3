"""Where every plane lives and what updates it: a pure function of demands, budgets and wishes. No tensors, no torch."""

from lorica.place.assign import assign
from lorica.place.demand import Budget, Budgets, Constraints, Free, PlaneDemand, Speeds
from lorica.place.fitting import Alternative, DoesNotFit, place
from lorica.place.placements import Placements, PlanePlacement, TierUse, Traffic

__all__ = [
    "Alternative",
    "Budget",
    "Budgets",
    "Constraints",
    "DoesNotFit",
    "Free",
    "Placements",
    "PlaneDemand",
    "PlanePlacement",
    "Speeds",
    "TierUse",
    "Traffic",
    "assign",
    "place",
]
