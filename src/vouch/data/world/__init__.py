"""The embedded world: a simulated marketplace with known ground truth, the same on every machine.

Two shops (home, fashion) share some users and items; people come by search, feed or mail. `build` gives a small world
with its truth; `write_log` streams a log of any size to Parquet in constant memory.
"""

from vouch.data.world.build import World, build, write_log
from vouch.data.world.config import WorldConfig
from vouch.data.world.truth import Truth

__all__ = ["Truth", "World", "WorldConfig", "build", "write_log"]
