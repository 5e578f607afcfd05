"""The contract of a method and its promises, for methods written elsewhere.

Imported by whoever asks::

  from optax_mtl import testing

  testing.check_contract(make)
  testing.check_promise("symmetric", make)
  testing.check_scale("sum", make)

``make`` takes the number of tasks and returns the method, as do those of
:data:`optax_mtl.METHODS`, whose tests call the same functions.
"""

from optax_mtl.testing.contract import LAWS as LAWS
from optax_mtl.testing.contract import check_contract as check_contract
from optax_mtl.testing.contract import check_law as check_law
from optax_mtl.testing.promises import PROMISES as PROMISES
from optax_mtl.testing.promises import check_promise as check_promise
from optax_mtl.testing.promises import check_scale as check_scale
