"""Display: what the verbs return, drawn in a terminal. Reads plain values; runs nothing, decides nothing.

What lives here: one function per thing shown, and the live front. What may not: measuring, searching, file formats.
`display.train` is imported where it is used, because it needs torch and the other verbs start without.
"""

from fivefold.display.live import LiveStudy as LiveStudy
from fivefold.display.static import catalogue as catalogue
from fivefold.display.static import comparison as comparison
from fivefold.display.static import machine as machine
from fivefold.display.static import measurement as measurement
from fivefold.display.static import shipped as shipped
from fivefold.display.study import explanation as explanation
from fivefold.display.study import nothing_fits as nothing_fits
from fivefold.display.study import pick as pick
from fivefold.display.study import plan as plan
from fivefold.display.study import result as result
