"""Where tests find the benchmarks: bench/ is a folder of scripts that import each other."""

from __future__ import annotations

import sys

from bench_command import ROOT

sys.path.insert(0, str(ROOT / "bench"))
sys.path.append(str(ROOT))  # for bench.gpu, bench.study; last, where the source tree hides nothing
