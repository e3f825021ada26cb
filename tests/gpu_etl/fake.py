"""One of the cases of simulated.py or fake_cases.py on the fake driver, in a process of its own:

NUMBA_DISABLE_JIT=1 python -m tests.gpu_etl.fake parse
"""

import gc
import sys
import warnings

from tests.gpu_etl import fake_driver

warnings.filterwarnings("ignore", "overflow encountered")  # uint64 wraps around, as it should
# Python's collector frees in whichever thread it comes: in one of the simulator's, too, while the kernel that it runs
# for holds the driver's lock.
gc.disable()
fake_driver.install()
sys.modules["cupy"] = fake_driver.cupy

from gpu_etl.backend.cuda import kernel as cuda_kernel  # noqa: E402 - on the fake driver

cuda_kernel.THREADS = 8  # a thread of the simulator is one of the operating system

from gpu_etl.backend.cuda import slab as cuda  # noqa: E402 - after THREADS
from tests.gpu_etl import simulated  # noqa: E402

simulated.ROWS, simulated.SIMULATED = 40, True
simulated.cuda_dictionary.HOT, simulated.cuda_dictionary.FIRST_SLOTS = 4, 16
simulated.cuda.require_gpu = lambda: None

if __name__ == "__main__":
    from tests.gpu_etl import fake_cases

    case = sys.argv[1]
    cuda.enter_thread()
    (getattr(fake_cases, case, None) or getattr(simulated, case))()
    assert not fake_driver.faults, "\n".join(sorted(set(fake_driver.faults)))
    print("agrees", dict(sorted(fake_driver.calls.items())))
