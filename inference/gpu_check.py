"""Check unidiff on this machine's GPU in at most 8 minutes: python inference/gpu_check.py --out out/gpu-check"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from unidiff.errors import exit_status
from unidiff.process import parsed, set_up_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu-check"), help="folder of the results; runs go on there"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes; always so on a CPU")
    given = parsed(parser)
    set_up_process(os.environ)

    from unidiff.evaluation.benchmark.gpu_check import Place, run_checks, summary
    from unidiff.evaluation.benchmark.gpu_checks import CHECKS
    from unidiff.process import pick_device

    device, root = pick_device(given.device), Path(__file__).resolve().parents[1]
    outcomes = run_checks(CHECKS, Place(device, root, given.tiny or device.type == "cpu"), given.out, print)
    print(f"{summary(outcomes)}: {given.out / 'gpu-check.html'}")
    unfinished = device.type == "cuda" and any(o.status == "not run" for o in outcomes)
    return 1 if unfinished or any(o.status == "failed" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(exit_status(main, failed=2))
