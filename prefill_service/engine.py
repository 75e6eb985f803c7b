"""Entry point of a prefill worker's engine process."""

import sys

from prefill_service.role import PrefillRole
from worker.engine_parts import KvTraffic
from worker.engine_process import run_engine

if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1:], PrefillRole, traffic=KvTraffic.SENDS))
