"""By what the modules are chosen: one file a method. Those of this package are registered here."""

from . import alpha_test as alpha_test
from . import custom as custom
from . import darts as darts
from . import frank_wolfe as frank_wolfe
from . import gradients as gradients
from . import random as random
from . import sampled as sampled
from . import synflow as synflow
