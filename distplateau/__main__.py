"""``python -m distplateau``, which is what ``accelerate launch -m distplateau`` runs."""

import sys

from distplateau.cli import main

sys.exit(main())
