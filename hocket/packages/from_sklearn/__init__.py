"""Fitted scikit-learn estimators as models that an `.apr` file holds.

    conversion = convert(estimator, name="iris")
    for expert in conversion.experts:
        data = apr.write(expert.model, name=expert.name, labels=expert.labels)

One estimator becomes one expert. A vote becomes its members, with the weights of a mixture. Scalers that move and
stretch each column by itself are folded into what follows them in a pipeline. Whatever cannot be answered alike is
refused, and what remains of a difference is said in `ConvertedExpert.notes`.

Only attributes of the estimator are read, so nothing here needs scikit-learn installed, but for `load_estimator`.
Formulas are those of scikit-learn 1.9; `docs/packages.md` lists what becomes what.
"""

from __future__ import annotations

from hocket.packages.from_sklearn.conversion import Conversion, ConvertedExpert, Label, convert
from hocket.packages.from_sklearn.loading import load_estimator

__all__ = ["Conversion", "ConvertedExpert", "Label", "convert", "load_estimator"]
