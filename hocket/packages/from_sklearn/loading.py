"""Estimators from files that run nothing."""

from __future__ import annotations

import io
import zipfile
from typing import Final

from hocket.errors import HocketError, Reason
from hocket.packages.from_sklearn.reading import Estimator, bad
from hocket.packages.limits import DEFAULT_LIMITS, Limits

_BUILT_TOO: Final = frozenset(
    {
        "sklearn.metrics._dist_metrics.EuclideanDistance64",
        "sklearn.metrics._dist_metrics.ManhattanDistance64",
        "sklearn.metrics._dist_metrics.MinkowskiDistance64",
        "sklearn.neighbors._ball_tree.BallTree",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
        "sklearn.utils._bunch.Bunch",
    }
)
"""Parts of estimators that skops does not vouch for, since they could be made to answer wrongly or to crash. They run
nothing when they are built, and nothing here asks them for answers: their arrays are read."""


def load_estimator(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Estimator:
    """The estimator that `skops.io.dump` has written.

    Only types that skops itself vouches for are built (scikit-learn's, numpy's and plain values) and some parts of
    estimators. Pickles can run anything, and are not read at all.

    Raises:
        HocketError: `BAD_REQUEST` for anything but such a file, one that holds other types, or if skops is not
            installed; `TOO_LARGE` beyond a limit.
    """
    try:
        from skops import io as skops_io  # noqa: PLC0415 - an extra, for those who convert
    except ImportError as error:
        raise bad("reading a .skops file needs skops: pip install 'hocket[sklearn]'") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise bad("it is not a .skops file: write one with skops.io.dump(estimator, 'model.skops')") from error
    if len(members) > limits.archive_files or sum(member.file_size for member in members) > limits.archive_bytes:
        raise HocketError(
            Reason.TOO_LARGE,
            f"the .skops file unpacks to more than {limits.archive_bytes} bytes or {limits.archive_files} files",
        )
    try:
        found = set(skops_io.get_untrusted_types(data=data))
        strange = sorted(found - _BUILT_TOO)
        if not strange:
            return skops_io.loads(data, trusted=sorted(found))
    except Exception as error:  # what skops raises for a damaged file is not documented
        raise bad(f"the .skops file cannot be read: {error}") from error
    raise bad(f"the .skops file holds types that nobody vouches for: {', '.join(strange)}")
