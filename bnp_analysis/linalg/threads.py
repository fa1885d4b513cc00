"""Small eigenproblems on one thread.

NumPy's BLAS has threads of its own beside torch's. For matrices of a hundred rows they wait for one another, and for
torch's, ten times longer than they compute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

# Rows up to which BLAS libraries do not divide an eigenproblem, and switching them takes longer than it.
_ALONE = 16


@cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # it comes with scikit-learn; without it all is only slower
        return None
    return ThreadpoolController()


def one_blas_thread(size: int | None = None) -> AbstractContextManager[Any]:
    """Inside it NumPy's and SciPy's BLAS use one thread; torch's threads stay as they are.

    Args:
        size: of the matrices inside; for small ones nothing is switched, since BLAS takes one thread by itself.

    Example:
        >>> import numpy as np
        >>> with one_blas_thread():
        ...     np.linalg.eigvalsh(np.eye(2)).tolist()
        [1.0, 1.0]
    """
    if size is not None and size <= _ALONE:
        return nullcontext()
    controller = _controller()
    limit: AbstractContextManager[Any] = (
        nullcontext() if controller is None else controller.limit(limits=1, user_api="blas")
    )
    return limit
