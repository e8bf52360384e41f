"""Training. The package itself can be called, because users write ``from swift import train; train({...})``.

The import system binds the name ``swift.train`` to this package as soon as any of its modules is loaded, so the
function of that name has to be the package. See docs/decisions/003-callable-packages.md.
"""

import importlib
import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`swift.api.train`."""
        return importlib.import_module("swift.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
