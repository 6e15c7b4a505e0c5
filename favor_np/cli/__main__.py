"""``python -m favor_np.cli``: the program, where its script is not on the path."""

import sys

from . import main

sys.exit(main())
