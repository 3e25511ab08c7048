"""`python -m fomoe_ext.train`: a process of the training job, for torchrun and `fomoe train`."""

import sys

from fomoe_ext.train.process import main

sys.exit(main())
