"""Entry point of a unified worker's engine process."""

import sys

from unified_service.role import UnifiedRole
from worker.engine_parts import KvTraffic
from worker.engine_process import run_engine

if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1:], UnifiedRole, traffic=KvTraffic.NONE))
