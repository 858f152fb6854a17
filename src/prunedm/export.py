"""`import prunedm.export` gives the function of that name, as `prunedm.export` always is.

The import system binds what stands in `sys.modules` once a module has run; this one puts the
function there. Whoever imports `prunedm.export` as a module would hide the function otherwise.
"""

import sys

from prunedm.stages import export

sys.modules[__name__] = export  # type: ignore[assignment]
