"""``python -m swift`` is the ``swift`` command."""

import sys

from swift.cli.main import main

sys.exit(main())
