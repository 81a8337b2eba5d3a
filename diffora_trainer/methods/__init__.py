"""How the modules are chosen: one file a method. Those of this package are registered here."""

from . import adalora as adalora
from . import aletheia as aletheia
from . import alora as alora
from . import alpha_test as alpha_test
from . import beamlora as beamlora
from . import cka as cka
from . import custom as custom
from . import darts as darts
from . import eva as eva
from . import frank_wolfe as frank_wolfe
from . import gelora as gelora
from . import gradients as gradients
from . import prilora as prilora
from . import random as random
from . import sampled as sampled
from . import sora as sora
from . import synflow as synflow
