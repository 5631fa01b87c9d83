"""Print what setup.cfg asks for, with the extras that are named, one requirement a line.

The images install it before the package itself is there, so that a change of lmim's code leaves that layer as it is.
"""

from __future__ import annotations

import configparser
import sys

setup = configparser.ConfigParser(interpolation=None)
setup.read("setup.cfg")
wanted = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in sys.argv[1:])]
print("\n".join(line for lines in wanted for line in lines.split("\n") if line))
