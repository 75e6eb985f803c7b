"""Entry point of a unified worker's engine process."""

import sys

from unified_service.role import UnifiedRole
from worker.ending import end_process
from worker.engine_process import run_engine
from worker.kv_traffic import KvTraffic

if __name__ == "__main__":
    end_process(run_engine(sys.argv[1:], UnifiedRole, traffic=KvTraffic.NONE))
